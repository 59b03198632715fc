"""How a step tells how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable

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
