"""The wall: a model whose global attention returns zeros, for as long as it is measured.

The work that no schedule can reduce still runs: norm, query projection, query norm and rotary
embedding, output projection and MLP. Keys and values are projected for the tokens of a single
frame, the fewest that every family's own code accepts; of 256 frames that is 0.4 % of their
projection.

Each global attention module runs the family's ``reduced_forward``, in which
`F.scaled_dot_product_attention` returns zeros. A family needs no code for it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..families.base import Family
from ..layout import TokenLayout
from ..reduction.operators import Operators, TemporalStride, TokenStride
from ..reduction.rule import ResolvedRule
from ..runner import Runner
from ..sdpa import ReplaceSDPA
from .apply import replace_attention
from .patch import LayerForward, Patch


def apply_wall(runner: Runner) -> Patch:
    """Let the model's global attention return zeros until the patch is removed.

    An earlier schedule on the model is replaced. The patch is used like the handle that
    `spark3r.apply` returns: ``with apply_wall(runner): ...``.
    """
    return replace_attention(runner, wall_forward(runner.family))


def wall_forward(family: Family) -> LayerForward:
    """Return a replacement of a global attention module's forward that attends to nothing."""

    def forward(attn: nn.Module, layout: TokenLayout, *args: Any, **kwargs: Any) -> Tensor:
        with ReplaceSDPA(_zeros):
            return family.reduced_forward(attn, layout, fewest_keys(layout), *args, **kwargs)

    return forward


def fewest_keys(layout: TokenLayout) -> ResolvedRule:
    """Return the resolved rule that keeps keys and values of one frame and merges no query."""
    if layout.frames > 1:
        return ResolvedRule(1, layout.frames, Operators(key_value=TemporalStride()))
    return ResolvedRule(1, layout.patches, Operators(key_value=TokenStride()))


def _zeros(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    # In the values' precision: under autocast a query norm may leave queries in float32.
    return value.new_zeros((*query.shape[:-1], value.shape[-1]))
