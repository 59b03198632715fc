"""Something else in place of scaled dot-product attention, wherever a model calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InPlaceOfProducts(TorchFunctionMode):
    """Calls a function with the arguments of every ``F.scaled_dot_product_attention``.

    Inside the function the original is called as usual.

    Args:
        attend: Takes and returns what that does.
    """

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = self.attend if func is F.scaled_dot_product_attention else func
        return call(*args, **(kwargs or {}))
