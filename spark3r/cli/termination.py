"""SIGTERM, by which schedulers preempt a job: commands clean up as they do after Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
"""Exit status after Ctrl-C and after SIGTERM."""


class Terminated(BaseException):
    """The process got SIGTERM.

    Like `KeyboardInterrupt` it passes through everything that handles errors. Unlike it, it does
    not make a search verify its best schedule, because a preempted job has seconds left.
    """


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Raise `Terminated` in the block on SIGTERM, unless the program handles that signal itself.

    Further such signals have no effect in the block, so that cleaning up is not interrupted.
    Outside of the main thread, where Python receives no signals, nothing is changed.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    try:
        signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def word_and_status(stop: BaseException) -> tuple[str, int]:
    """Return what messages call the end of a command, and its exit status."""
    if isinstance(stop, Terminated):
        return "terminated", TERMINATED
    return "interrupted", INTERRUPTED
