"""Models on torch's meta device, where tensors have shapes and no values.

Torch knows no autocast there, so whoever follows a pass follows its precision as well.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .patching.apply import remove


class Precision(Protocol):
    """What follows the precision of a pass.

    Attributes:
        half: Precision of autocast where the pass is now; None if it is off.
    """

    half: torch.dtype | None

    def forget_casts(self) -> None:
        """Forget weights that were cast: the cache of autocast was cleared."""


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model without values, on the meta device and without a schedule."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    with _CopyToMeta():
        twin: Any = copy.deepcopy(model, memo)
    remove(twin)
    if hasattr(twin, "use_multimodal"):
        twin.use_multimodal = False  # Pi3X would look at the values of poses that it is not given
    return twin


class _CopyToMeta(TorchFunctionMode):
    """A context in which deep copies of tensors, buffers and cached ones, have no values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            memo[id(tensor)] = torch.empty_like(tensor, device="meta")
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


@contextmanager
def autocast_followed(count: Precision) -> Iterator[None]:
    """Return a context in which autocast of this thread, for any device, switches a precision.

    Models turn it off around their heads, by the device of their tensors or by name, and torch
    knows no autocast on the meta device.
    """
    kind: Any = torch.amp.autocast_mode.autocast
    thread = threading.get_ident()
    init, enter, leave = kind.__init__, kind.__enter__, kind.__exit__
    outside: list[torch.dtype | None] = []

    def begin(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != thread:
            init(self, device_type, *args, **kwargs)
            return
        given = {**dict(zip(("dtype", "enabled"), args, strict=False)), **kwargs}
        half = given.get("dtype") or torch.bfloat16
        self._spark3r_half = half if given.get("enabled", True) else None

    def on(self: Any) -> Any:
        if threading.get_ident() != thread:
            return enter(self)
        outside.append(count.half)
        count.half = self._spark3r_half
        return self

    def off(self: Any, *error: Any) -> Any:
        if threading.get_ident() != thread:
            return leave(self, *error)
        count.half = outside.pop()
        return None

    clear = torch.clear_autocast_cache

    def forget() -> None:
        if threading.get_ident() == thread:
            count.forget_casts()
        else:
            clear()

    kind.__init__, kind.__enter__, kind.__exit__ = begin, on, off
    torch.clear_autocast_cache = forget
    try:
        yield
    finally:
        kind.__init__, kind.__enter__, kind.__exit__ = init, enter, leave
        torch.clear_autocast_cache = clear
