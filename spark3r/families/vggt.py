"""VGGT: 24 pairs of frame and global attention in an aggregator, heads on top of four of them.

A frame has one camera token, four registers and the patches. Frame 0 has camera and register tokens
of its own. The entry is the aggregator, which people also call without the heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..layout import TokenLayout
from ..reduction.exchange import Exchange
from ..reduction.rule import ResolvedRule
from .base import Family, Replacement
from .parts import aggregator, vggt_memory
from .parts.preprocessing import crop_width
from .parts.query_key import normalise_and_rotate
from .parts.recognition import (
    attentions,
    fused_attentions,
    has,
    is_fused_attention,
    locate,
    located,
    refuse_dropout,
    unlike,
)
from .parts.reduced import reduced_attention
from .parts.rotary import without_waiting
from .parts.sharded import on_whole_clip, refuse_unlike, refused, special_of_last

_AGGREGATORS = ("aggregator", "")
_ARGUMENTS = ("x", "pos")
_START = "patch_start_idx"
_CAMERA_USES = vggt_memory.VERSION.camera


def _alternates(module: Any) -> bool:
    """Return True if a module has blocks and special tokens like VGGT's aggregator."""
    parts = ("frame_blocks", "global_blocks", "camera_token", "register_token", _START)
    return has(module, *parts, "patch_size") and bool(attentions(module.global_blocks))


def _is_aggregator(module: Any) -> bool:
    return _alternates(module) and all(
        is_fused_attention(attn, _ARGUMENTS) for attn in attentions(module.global_blocks)
    )


def _explain_mismatch(root: nn.Module) -> str | None:
    found = locate(root, _AGGREGATORS, _alternates)
    if found is None:
        return None
    attn = attentions(found[1].global_blocks)[0]
    reason = unlike(attn, _ARGUMENTS, "VGGT")
    if "global_merging" in reason:
        reason += (
            "; this is FastVGGT, which merges tokens by itself. Load the original: "
            "pip install git+https://github.com/facebookresearch/vggt"
            "@44b3afbd1869d8bde4894dd8ea1e293112dd5eba"
        )
    return reason


def _aggregator(root: nn.Module) -> tuple[str, Any]:
    return located(root, _AGGREGATORS, _is_aggregator, "VGGT")


def _attention(root: nn.Module) -> dict[str, nn.Module]:
    path, entry = _aggregator(root)
    prefix = f"{path}." if path else ""
    modules = attentions(entry.global_blocks)
    return {f"{prefix}global_blocks.{i}.attn": attn for i, attn in enumerate(modules)}


def _reduced_forward(
    attn: Any, layout: TokenLayout, rule: ResolvedRule, x: Tensor, pos: Tensor | None = None
) -> Tensor:
    refuse_dropout(attn)
    prepare = partial(normalise_and_rotate, attn, layout, rotary=attn.rope is not None)
    return reduced_attention(attn, layout, rule, x, prepare)


def _unread(root: nn.Module) -> Iterator[Replacement]:
    # Points are unprojected depth, and a head that is None does not run.
    if has(root, "aggregator", "depth_head", "point_head"):
        yield root, "point_head", None


def _sharding(root: Any, exchange: Exchange) -> Iterator[Replacement]:
    entry = _aggregator(root)[1]
    exchange.first_tokens += [(entry, name) for name in ("camera_token", "register_token")]
    camera = None if root is entry else getattr(root, "camera_head", None)
    if camera is not None:
        refuse_unlike(camera, _CAMERA_USES, "camera head")
        yield from on_whole_clip(camera, exchange, partial(special_of_last, exchange, 1))
    tracker = None if root is entry else getattr(root, "track_head", None)
    if tracker is not None:
        yield from refused(tracker, exchange, "VGGT's tracker follows points through all frames")


FAMILY = Family(
    name="vggt",
    usage="model(images) or model.aggregator(images)",
    matches=lambda root: locate(root, _AGGREGATORS, _is_aggregator) is not None,
    explain_mismatch=_explain_mismatch,
    attention=_attention,
    entry=lambda root: _aggregator(root)[1],
    layout=partial(aggregator.layout, start=_START),
    reduced_forward=_reduced_forward,
    frame_attention=lambda root: fused_attentions(_aggregator(root)[1].frame_blocks, _ARGUMENTS),
    frame_forward=_reduced_forward,
    predict=aggregator.predict,
    preprocess=crop_width,
    metadata=lambda root: aggregator.metadata(_aggregator(root)[1], start=_START),
    compile_fixes=without_waiting,
    memory_savers=lambda root: vggt_memory.memory_savers(root, _aggregator(root)[1]),
    prediction_savers=lambda root: vggt_memory.prediction_savers(root, _aggregator(root)[1]),
    unread=_unread,
    sharding=_sharding,
)
