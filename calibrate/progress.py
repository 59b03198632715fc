"""Progress and messages of a calibration, and how long each step takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


EVERY_S = 15.0
"""Seconds between two lines of one step, where there are no bars."""

Progress = Callable[[int, int], object]
"""Callback(done, total) for one step."""


def no_progress(done: int, total: int) -> None:
    """Show no progress."""


class Reporter:
    """Receives the progress and the messages of a calibration. This one shows nothing."""

    def progress(self, step: str, done: int, total: int) -> None:
        """Receive how much of a step is done."""

    def say(self, line: str) -> None:
        """Receive a message to the user, one line."""

    def step(self, name: str) -> Progress:
        """Return the callback(done, total) for the progress of one step."""
        return partial(self.progress, name)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave no trace on the terminal."""


class TerminalReporter(Reporter):
    """Shows progress and messages on stderr.

    On a terminal each step has a bar with the remaining time, elsewhere a line now and then. As a
    context manager it starts and stops the bars.

    Args:
        clock: Function that returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self._begun: dict[str, float] = {}
        self._reported: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._finished: set[str] = set()
        self._bars: Bars | None = None
        if sys.stderr.isatty():
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
        if self._bars is not None:
            if step not in self._tasks:
                self._tasks[step] = self._bars.add_task(step, total=total)
            self._bars.update(self._tasks[step], completed=done, total=total)
        else:
            self._print(step, done, total)

    def say(self, line: str) -> None:
        """Show a line."""
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def _print(self, step: str, done: int, total: int) -> None:
        """Print a line when a step is done, and every `EVERY_S` with the remaining time."""
        now = self._clock()
        begun = self._begun.setdefault(step, now)
        last = self._reported.setdefault(step, now)
        if step in self._finished or (done < total and now - last < EVERY_S):
            return
        self._reported[step] = now
        line = f"[{now - self._begin:6.1f} s] {step}: {done} of {total}"
        if done == total:
            self._finished.add(step)
        elif done:
            line += f", about {(now - begun) * (total - done) / done:.0f} s left"
        print(line, file=sys.stderr, flush=True)


class CallbackReporter(Reporter):
    """Passes the progress on to a function.

    Args:
        callback: Function of step, done and total.
    """

    def __init__(self, callback: Callable[[str, int, int], object]) -> None:
        self._callback = callback

    def progress(self, step: str, done: int, total: int) -> None:
        """Pass the progress on."""
        self._callback(step, done, total)


class StepTimes(Reporter):
    """Passes everything on to another reporter, and measures how long each step takes.

    Args:
        reporter: The other reporter.
        clock: Function that returns seconds.

    Attributes:
        seconds: Time from the first to the last report of each step, by name.
    """

    def __init__(self, reporter: Reporter, clock: Callable[[], float] = time.monotonic) -> None:
        self._reporter, self._clock = reporter, clock
        self._begin: dict[str, float] = {}
        self._created = clock()
        self.seconds: dict[str, float] = {}

    def elapsed_s(self) -> float:
        """Return the seconds since this was created."""
        return self._clock() - self._created

    def progress(self, step: str, done: int, total: int) -> None:
        """Note the time, and pass the progress on."""
        now = self._clock()
        self.seconds[step] = now - self._begin.setdefault(step, now)
        self._reporter.progress(step, done, total)

    def say(self, line: str) -> None:
        """Pass the message on."""
        self._reporter.say(line)
