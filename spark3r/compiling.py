"""A mark that `torch.compile` reads, set without importing the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def assume_constant_result(function: F) -> F:
    """Mark a function whose result is a constant to `torch.compile`, and return it.

    The mark is that of `torch.compiler.assume_constant_result`. That function imports the whole
    compiler, which takes as long as importing torch, whether or not anything is compiled.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
