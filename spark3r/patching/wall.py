"""The wall: a model whose global attention returns zeros, for as long as it is measured.

What cannot be reduced still runs: norm, query projection, query norm and rotary embedding, output
projection and MLP. Keys and values are projected for the tokens of a single frame, the fewest that
every family's own code can be given; of 256 frames that is 0.4 % of their projection.

The wall is applied like any schedule: `spark3r.apply` puts the family's ``attend`` in the place of
each global attention forward, and here that ``attend`` runs with `F.scaled_dot_product_attention`
answering zeros. So no family needs to know of it, and the model is left bit for bit as it was.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..families.base import Family, unwrap
from ..families.registry import detect
from ..layout import TokenLayout
from ..schedule import LayerRule, Operators, Schedule
from .handle import Handle
from .patch import apply

# The rules of this schedule are never followed: it only has to be reduced, at any clip length.
_ANY_REDUCTION = 2


def apply_wall(model: nn.Module, family: Family | None = None) -> Handle:
    """Let the model's global attention return zeros until the handle is removed.

    A schedule that was applied before is replaced.

    Args:
        model: The model, patched in place.
        family: What is known of it; None recognises it.

    Returns:
        The handle, to be used like that of `spark3r.apply`: ``with apply_wall(model): ...``.

    Raises:
        FamilyError: If the model is of no known family and none is given.
    """
    root = unwrap(model)
    family = detect(root) if family is None else family
    layers = len(family.attention(root))
    schedule = Schedule.uniform(layers, query=_ANY_REDUCTION)
    return apply(model, schedule, family=wall_family(family))


def wall_family(family: Family) -> Family:
    """Return the family with an ``attend`` whose attention products are left out."""

    def attend(
        attn: nn.Module, layout: TokenLayout, rule: LayerRule, *args: Any, **kwargs: Any
    ) -> Tensor:
        with _NoProducts():
            return family.attend(attn, layout, fewest_keys(layout), *args, **kwargs)

    return replace(family, attend=attend)


def fewest_keys(layout: TokenLayout) -> LayerRule:
    """Return the resolved rule that keeps keys and values of one frame and merges no query."""
    if layout.frames > 1:
        return LayerRule(1, layout.frames, Operators())
    return LayerRule(1, max(1, layout.patches), Operators(key_value="token_stride"))


class _NoProducts(TorchFunctionMode):
    """Answers scaled dot-product attention with zeros of the right shape."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, _, value = _three(*args, **kwargs)
        # The values' precision: under autocast a query norm may have left queries in float32.
        return value.new_zeros((*query.shape[:-1], value.shape[-1]))


def _three(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return query, key, value
