"""Progress on stderr: bars with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


EVERY_S = 15.0
"""Seconds between two lines of one step, where there are no bars."""

Progress = Callable[[str, int, int], None]
"""Told the name of a step, how much of it is done, and its total."""

Samples = Callable[[int, int], None]
"""Told how much of one step is done, and its total."""

Say = Callable[[str], None]
"""Told what the user should know, a line at a time."""


def unseen(step: str, done: int, total: int) -> None:
    """Show no progress."""


def uncounted(done: int, total: int) -> None:
    """Show no progress of one step."""


def unsaid(line: str) -> None:
    """Show no line."""


class Reporter:
    """Shows steps and lines; as a context manager it clears up behind itself.

    Args:
        quiet: Show nothing.
        clock: Seconds; replaced in tests.
    """

    def __init__(self, *, quiet: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._quiet, self._clock = quiet, clock
        self._begin = clock()
        self._begun: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._finished: set[str] = set()
        self._bars: Bars | None = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("{task.description:<18}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )

    def __enter__(self) -> Reporter:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def progress(self, step: str, done: int, total: int) -> None:
        """Show how much of a step is done."""
        if self._quiet:
            return
        if self._bars is not None:
            if step not in self._tasks:
                self._tasks[step] = self._bars.add_task(step, total=total)
            self._bars.update(self._tasks[step], completed=done, total=total)
        else:
            self._tell(step, done, total)

    def say(self, line: str) -> None:
        """Show a line."""
        if self._quiet:
            return
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _tell(self, step: str, done: int, total: int) -> None:
        """Print a line when a step is done, and every `EVERY_S` with the time that is left."""
        now = self._clock()
        begun = self._begun.setdefault(step, now)
        last = self._told.setdefault(step, now)
        if step in self._finished or (done < total and now - last < EVERY_S):
            return
        self._told[step] = now
        line = f"[{now - self._begin:6.1f} s] {step}: {done} of {total}"
        if done == total:
            self._finished.add(step)
        elif done:
            line += f", about {(now - begun) * (total - done) / done:.0f} s left"
        print(line, file=sys.stderr, flush=True)


class StepTimes:
    """Passes progress on, and keeps how long each step took.

    Args:
        progress: Told what this is told.
        clock: Seconds; replaced in tests.

    Attributes:
        seconds: From a step's first word to its last, by name.
    """

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self._pass_on, self._clock = progress, clock
        self._begin: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def progress(self, step: str, done: int, total: int) -> None:
        """Take note of a step, and pass it on."""
        now = self._clock()
        self.seconds[step] = now - self._begin.setdefault(step, now)
        self._pass_on(step, done, total)
