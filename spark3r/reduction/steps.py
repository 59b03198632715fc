"""Steps of reduced attention that an observer can time: matching, merging, unmerging."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")

Observer = Callable[[str], AbstractContextManager[object]]
"""Called with the name of a step, returns the context in which the step runs."""

_observer: Observer | None = None


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Let every step that begins inside the block, in any thread, run in the observer's context."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def step(name: str, function: Callable[..., T], *args: object) -> T:
    """Return ``function(*args)``, run as a step of this name.

    Without an observer this is the plain call, and that is also what a compiler traces.
    """
    if _observer is None:
        return function(*args)
    with _observer(name):
        return function(*args)
