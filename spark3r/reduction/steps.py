"""Steps of reduced attention that an observer can time.

They are matching, merging, attention by a kernel that is not called through
``F.scaled_dot_product_attention``, and unmerging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")

Observer = Callable[[str, tuple[object, ...]], AbstractContextManager[object]]
"""Called with the name of a step and its arguments, returns the context in which it runs."""

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
    with _observer(name, args):
        return function(*args)
