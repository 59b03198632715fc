"""The reference model (`spark3r.reference`): a small model in the shape of VGGT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import PIXEL_CENTRE
from ..layout import TokenLayout
from ..reduction.exchange import Exchange
from ..reduction.pruning import KeySelection
from ..reduction.rule import ResolvedRule
from ..rope import apply_rope
from .base import Family, Replacement
from .parts import aggregator
from .parts.memory import aggregator_in_pieces
from .parts.preprocessing import balanced
from .parts.query_key import Where, fused, is_fused
from .parts.recognition import attentions
from .parts.reduced import reduced_attention

_START = "patch_start_idx"
_FIRST_TOKENS = ("camera_token", "register_token")


def _matches(root: nn.Module) -> bool:
    # By name and not by class, as in every family: a copy of the code is the same architecture.
    return type(root).__name__ == "ReferenceModel" and hasattr(root, "aggregator")


def _attention(root: Any) -> dict[str, nn.Module]:
    blocks = root.aggregator.global_blocks
    return {f"aggregator.global_blocks.{i}.attn": block.attn for i, block in enumerate(blocks)}


def _reduced_forward(
    attn: Any, layout: TokenLayout, rule: ResolvedRule, x: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:
    def prepare(
        norm: nn.Module | None, make: Callable[[], Tensor], where: Where, dtype: torch.dtype
    ) -> Tensor:
        own = rope if where is None else (_taken(rope[0], where), _taken(rope[1], where))
        tokens = make()
        if is_fused(attn, tokens, dtype):
            return fused(norm, tokens, dtype, own, None)
        return apply_rope((tokens if norm is None else norm(tokens)).to(dtype), own)

    return reduced_attention(attn, layout, rule, x, prepare)


def _taken(rows: Tensor, where: slice | KeySelection) -> Tensor:
    return rows[where] if isinstance(where, slice) else where.take(rows, 0)


def _memory_savers(root: Any) -> Iterator[Replacement]:
    yield from aggregator_in_pieces(root.aggregator, root.aggregator.global_blocks)


def _sharding(root: Any, exchange: Exchange) -> Iterator[Replacement]:
    exchange.first_tokens += [(root.aggregator, name) for name in _FIRST_TOKENS]
    yield root, "unit", partial(_unit, root, exchange)
    yield root.camera_head, "forward", partial(_cameras, root.camera_head, exchange)


def _unit(self: Any, exchange: Exchange, depth: Tensor) -> Tensor:
    """Return the mean depth of the whole clip's first frame."""
    unit: Tensor = type(self).unit(self, depth)
    return unit if exchange.shard is None else exchange.first(unit)


def _cameras(self: Any, exchange: Exchange, tokens: Tensor) -> Tensor:
    """Return cameras of which the identity is that of the whole clip's first frame."""
    forward = type(self).forward
    if exchange.shard is None or exchange.shard.rank == 0:
        return forward(self, tokens)
    return forward(self, torch.cat((tokens[:, :1], tokens), dim=1))[:, 1:]


FAMILY = Family(
    name="reference",
    usage="model(images) or model.aggregator(images)",
    matches=_matches,
    attention=_attention,
    entry=lambda root: root.get_submodule("aggregator"),
    layout=partial(aggregator.layout, start=_START),
    reduced_forward=_reduced_forward,
    frame_attention=lambda root: attentions(root.get_submodule("aggregator.frame_blocks")),
    frame_forward=_reduced_forward,
    predict=partial(aggregator.predict, pixel_centre=PIXEL_CENTRE),
    preprocess=partial(balanced, resolution=64, patch=8),  # it was trained at 64x64 pixels
    patches_overlap=True,
    metadata=lambda root: aggregator.metadata(root.get_submodule("aggregator"), start=_START),
    memory_savers=_memory_savers,
    sharding=_sharding,
)
