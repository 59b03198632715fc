"""The stages of a command: shown on stderr while they run, and logged as lines of JSON."""

from __future__ import annotations

import datetime
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Spark3rError, first_line, printable
from .termination import Terminated, word_and_status

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .progress import LayerProgress

WORDS = {
    "load": "loading the model",
    "plan": "planning for memory",
    "read": "reading the clip",
    "warm-up": "warming up",
    "dense": "dense pass",
    "reduced": "reduced pass",
    "compare": "comparing",
    "write": "writing",
    "export": "exporting",
}
"""What the user reads of each stage."""

PASSES = ("dense", "reduced")
"""Stages whose end is told."""

OTHERS_SHOW = ("load",)
"""Stages in which others show progress of their own, such as that of a download."""

SHOWN_AFTER_S = 1.0
"""Seconds after which a terminal shows a stage that is not over."""


class Stages:
    """Shows and logs the stages of a command.

    On a terminal a line on stderr shows the present stage, its duration and, of a pass, how many
    global layers are done and when the last one will be. Elsewhere there is a line when a stage
    begins, and one when a pass ends.

    Args:
        log: File without a buffer. One JSON object per stage is written to it, as soon as the
            stage is over. None for no log.
        clock: Function that returns seconds.
        shown: False shows nothing, as in ranks of which another one speaks.
    """

    def __init__(
        self,
        log: RawIOBase | None = None,
        clock: Callable[[], float] = time.monotonic,
        shown: bool = True,
    ) -> None:
        self._shows = shown
        self._log = log
        self._clock = clock
        self._device: torch.device | str = "cpu"
        self._highest_gb: float | None = None
        self._earlier: LayerProgress | None = None  # of the last pass

    def on(self, device: torch.device | str) -> None:
        """Measure the memory of this device from now on; before, it is that of the process."""
        self._device = device

    def say(self, message: str) -> None:
        """Show a line on stderr."""
        if not self._shows:
            return
        print(f"spark3r: {printable(message)}", file=sys.stderr, flush=True)

    @contextmanager
    def __call__(self, name: str, modules: Collection[nn.Module] = ()) -> Iterator[None]:
        """Show and log one stage.

        Args:
            name: One of `WORDS`.
            modules: Global attention modules that run in it, for a pass.
        """
        from ..memory import peak_bytes, reset_peak

        if self._log is not None:
            reset_peak(self._device)
        begin, error = self._clock(), ""
        try:
            with self._shown(name, modules, begin):
                yield
        except BaseException as raised:
            error = _reason(raised)
            raise
        finally:
            seconds = self._clock() - begin
            if name in PASSES and not error:
                self.say(f"{WORDS[name]}: done after {seconds:.1f} s")
            if self._log is not None:
                peak = peak_bytes(self._device)
                peak_gb = None if peak is None else peak / 1e9
                self._highest_gb = max(filter(None, (peak_gb, self._highest_gb)), default=None)
                self._write(name, seconds, peak_gb, error)

    @contextmanager
    def whole_run(self) -> Iterator[None]:
        """Log, after the stages of the block, the whole of it."""
        begin, error = self._clock(), ""
        try:
            yield
        except BaseException as raised:
            error = _reason(raised)
            raise
        finally:
            self._write("run", self._clock() - begin, self._highest_gb, error)

    @contextmanager
    def _shown(self, name: str, modules: Collection[nn.Module], begin: float) -> Iterator[None]:
        if name in OTHERS_SHOW or not self._shows or not _can_redraw():
            self.say(WORDS[name])
            yield
            return
        import torch
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        from .progress import counted

        with counted(modules, torch.device(self._device), self._earlier, self._clock) as progress:

            def line() -> Text:
                seconds = self._clock() - begin
                text = _progress_line(WORDS[name], seconds, progress)
                return Text(f"spark3r: {text}" if seconds >= SHOWN_AFTER_S else "")

            console = Console(stderr=True)
            with Live(get_renderable=line, console=console, transient=True, refresh_per_second=4):
                yield
        if modules:
            self._earlier = progress

    def _write(self, name: str, seconds: float, peak_gb: float | None, error: str) -> None:
        """Append a line to the log."""
        if self._log is None:
            return
        now = datetime.datetime.now(datetime.timezone.utc)
        entry: dict[str, Any] = {
            "time": now.isoformat(timespec="seconds"),
            "stage": name,
            "seconds": round(seconds, 3),
            "peak_memory_gb": None if peak_gb is None else round(peak_gb, 3),
            "memory": str(self._device),
            "error": error or None,
        }
        line = (json.dumps(entry) + "\n").encode()
        try:
            if self._log.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as failed:
            self._log = None  # the work is worth more than its log
            self.say(f"the log cannot be written any more ({failed.strerror})")


def _can_redraw() -> bool:
    """Return True if stderr is a terminal on which a line can be written again."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def _progress_line(words: str, seconds: float, progress: LayerProgress) -> str:
    parts = [f"{words}, {seconds:.0f} s"]
    done, left = progress.done, progress.left_s
    if done:
        parts.append("heads" if done >= progress.total else f"layer {done} of {progress.total}")
    if left is not None and left >= 1:
        parts.append(f"about {left:.0f} s left")
    return ", ".join(parts)


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt | Terminated):
        return word_and_status(error)[0]
    return first_line(error)


@contextmanager
def opened(path: Path | None) -> Iterator[RawIOBase | None]:
    """Open a log to append to, without a buffer; None for no log.

    Raises:
        Spark3rError: If it cannot be written.
    """
    if path is None:
        yield None
        return
    try:
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise Spark3rError(f"--log-json {path} cannot be written ({error.strerror})") from error
    with file:
        yield file
