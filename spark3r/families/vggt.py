"""VGGT: 24 pairs of frame and global attention in an aggregator, heads on top of four of them.

Each frame is one camera token, four registers and the patches; frame 0 has camera and register
tokens of its own. The entry is the aggregator, which people also call without the heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..layout import TokenLayout
from ..prediction import Prediction
from ..reduction import attend, select
from ..schedule import LayerRule
from .family import Family
from .outputs import first_clip
from .preprocessing import crop_width
from .projection import join, project
from .rotary import rotate
from .structure import (
    attentions,
    clip_images,
    has,
    is_fused_attention,
    locate,
    refuse_dropout,
    refuse_stale_positions,
    unlike,
)
from .vggt_memory import saver

_AGGREGATORS = ("aggregator", "")
_ARGUMENTS = ("x", "pos")


def _alternates(module: Any) -> bool:
    """Whether a module has frame and global blocks and special tokens like VGGT's aggregator."""
    parts = ("frame_blocks", "global_blocks", "camera_token", "register_token", "patch_start_idx")
    return has(module, *parts, "patch_size") and bool(attentions(module.global_blocks))


def _is_aggregator(module: Any) -> bool:
    return _alternates(module) and all(
        is_fused_attention(attn, _ARGUMENTS) for attn in attentions(module.global_blocks)
    )


def _refuse(root: nn.Module) -> str | None:
    found = locate(root, _AGGREGATORS, _alternates)
    if found is None:
        return None
    attn = attentions(found[1].global_blocks)[0]
    reason = unlike(attn, _ARGUMENTS, "VGGT")
    if "global_merging" in reason:
        reason += (
            "; that is FastVGGT, which merges tokens on its own. Load the original: "
            "pip install git+https://github.com/facebookresearch/vggt"
        )
    return reason


def _aggregator(root: nn.Module) -> tuple[str, Any]:
    found = locate(root, _AGGREGATORS, _is_aggregator)
    assert found is not None, "asked of a model that matches() has not seen"
    return found


def _attention(root: nn.Module) -> dict[str, nn.Module]:
    path, aggregator = _aggregator(root)
    prefix = f"{path}." if path else ""
    modules = attentions(aggregator.global_blocks)
    return {f"{prefix}global_blocks.{i}.attn": attn for i, attn in enumerate(modules)}


def _layout(
    aggregator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, TokenLayout]:
    images = clip_images(args, kwargs, "images", "aggregator")
    patch = aggregator.patch_size
    height, width = images.shape[3] // patch, images.shape[4] // patch
    getter = getattr(aggregator, "position_getter", None)
    if getter is not None:
        where = "aggregator.position_getter.position_cache"
        refuse_stale_positions(getter.position_cache, (height, width), images.device, where)
    return images.shape[0], TokenLayout(
        frames=images.shape[1],
        height=height,
        width=width,
        special=aggregator.patch_start_idx,
        anchor_frame=0,
    )


def _attend(
    attn: Any, layout: TokenLayout, rule: LayerRule, x: Tensor, pos: Tensor | None = None
) -> Tensor:
    refuse_dropout(attn)
    selection = select(layout, rule, x.device)
    query, key, value = project(attn, x, selection)
    query, key = attn.q_norm(query), attn.k_norm(key)
    if attn.rope is not None:
        query, key = rotate(query, key, attn.rope, layout, selection)
    output = attend(query, key, value, layout, rule, selection)
    return attn.proj_drop(attn.proj(join(output)))


def _predict(output: Any, images: Tensor) -> Prediction:
    depth, confidence, pose = first_clip(output, "depth", "depth_conf", "pose_enc")
    # Depth and cameras agree better than the point head does (VGGT's README); VGGT unprojects
    # whole pixels.
    return Prediction.from_pose_encoding(depth, confidence, pose, pixel_centre=0.0)


def _facts(root: nn.Module) -> dict[str, int]:
    aggregator = _aggregator(root)[1]
    return {
        "patch_size": aggregator.patch_size,
        "special_tokens": aggregator.patch_start_idx,
    }


FAMILY = Family(
    name="vggt",
    usage="model(images) or model.aggregator(images)",
    matches=lambda root: locate(root, _AGGREGATORS, _is_aggregator) is not None,
    refuse=_refuse,
    attention=_attention,
    entry=lambda root: _aggregator(root)[1],
    layout=_layout,
    attend=_attend,
    predict=_predict,
    preprocess=crop_width,
    facts=_facts,
    saver=lambda root: saver(root, _aggregator(root)[1]),
)
