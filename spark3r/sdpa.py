"""Replacing ``F.scaled_dot_product_attention`` wherever a model calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ReplaceSDPA(TorchFunctionMode):
    """A context in which calls of ``F.scaled_dot_product_attention`` run another function.

    Calls that the function makes itself run the original.

    Args:
        function: Takes the arguments of ``F.scaled_dot_product_attention`` and returns its output.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = self.function if func is F.scaled_dot_product_attention else func
        return call(*args, **(kwargs or {}))
