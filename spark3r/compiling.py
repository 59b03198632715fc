"""What the runtime tells `torch.compile`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def assume_constant_result(function: F) -> F:
    """Mark a function whose result is a constant to `torch.compile`, and return it.

    The mark is that of `torch.compiler.assume_constant_result`. That function imports the whole
    compiler, which takes as long as importing torch, whether or not anything is compiled.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def eagerly() -> Iterator[None]:
    """Return a context in which compiled modules and functions run as they were written.

    Where the compiler was not imported, nothing is compiled, and nothing is imported for that.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch >= 2.6
    if set_stance is None:
        with torch._dynamo.config.patch(disable=True):
            yield
    else:
        with set_stance("force_eager"):
            yield
