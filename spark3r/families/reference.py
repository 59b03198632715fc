"""The reference model (`spark3r.reference`): VGGT's shape in small."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..layout import TokenLayout
from ..prediction import Prediction
from ..reduction import attend, select
from ..reference.rope import apply_rope
from ..schedule import LayerRule
from .family import Family
from .preprocessing import balanced
from .projection import join, project
from .structure import clip_images


def _matches(root: nn.Module) -> bool:
    # By name, as for every family: a copy loaded from elsewhere is still the same architecture.
    return type(root).__name__ == "ReferenceModel" and hasattr(root, "aggregator")


def _attention(root: Any) -> dict[str, nn.Module]:
    blocks = root.aggregator.global_blocks
    return {f"aggregator.global_blocks.{i}.attn": block.attn for i, block in enumerate(blocks)}


def _entry(root: Any) -> nn.Module:
    return root.aggregator


def _layout(
    aggregator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, TokenLayout]:
    images = clip_images(args, kwargs, "images", "aggregator")
    patch = aggregator.patch_size
    return images.shape[0], TokenLayout(
        frames=images.shape[1],
        height=images.shape[3] // patch,
        width=images.shape[4] // patch,
        special=aggregator.patch_start_idx,
        anchor_frame=0,
    )


def _attend(
    attn: Any, layout: TokenLayout, rule: LayerRule, x: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:
    selection = select(layout, rule, x.device)
    query, key, value = project(attn, x, selection)
    cos, sin = rope
    query = apply_rope(attn.q_norm(query).to(value.dtype), (cos, sin))
    if selection is not None:
        cos, sin = selection.take(cos, 0), selection.take(sin, 0)
    key = apply_rope(attn.k_norm(key).to(value.dtype), (cos, sin))
    return attn.proj(join(attend(query, key, value, layout, rule, selection)))


def _predict(output: Mapping[str, Tensor], images: Tensor) -> Prediction:
    return Prediction.from_pose_encoding(
        depth=output["depth"][0, ..., 0],
        confidence=output["depth_conf"][0],
        pose_encoding=output["pose_enc"][0],
    )


def _facts(root: Any) -> dict[str, int]:
    aggregator = root.aggregator
    return {
        "patch_size": aggregator.patch_size,
        "special_tokens": aggregator.patch_start_idx,
    }


FAMILY = Family(
    name="reference",
    usage="model(images) or model.aggregator(images)",
    matches=_matches,
    attention=_attention,
    entry=_entry,
    layout=_layout,
    attend=_attend,
    predict=_predict,
    preprocess=partial(balanced, resolution=64, patch=8),  # trained at 64x64
    facts=_facts,
)
