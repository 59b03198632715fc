"""π³ and Pi3X: one list of decoder blocks, even ones inside frames, odd ones global.

A frame has five registers, the same in all frames, and the patches. No frame is special, so there
is no anchor frame. The heads have blocks of the same class, which attend inside frames; they are
left alone, and so are Pi3X's pose injection and metric decoder. The entry is the model itself,
because the decoder is a method of it and not a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import FamilyError
from ..layout import TokenLayout
from ..prediction import Prediction
from ..reduction.exchange import Exchange
from ..reduction.rule import ResolvedRule
from .base import Family, Replacement
from .parts.outputs import first_clip
from .parts.pi3_memory import memory_savers, prediction_savers
from .parts.pinned import pinned_kernels
from .parts.preprocessing import first_image_area
from .parts.query_key import normalise_and_rotate
from .parts.recognition import (
    attentions,
    clip_images,
    fused_attentions,
    has,
    is_fused_attention,
    refuse_argument,
    refuse_dropout,
    refuse_stale_positions,
    unlike,
)
from .parts.reduced import reduced_attention
from .parts.rotary import without_waiting

_ARGUMENTS = ("x", "attn_bias", "xpos")


def _alternates(root: Any) -> bool:
    """Return True if a model has a decoder and registers like π³'s."""
    parts = ("encoder", "decoder", "decode", "register_token", "patch_start_idx", "patch_size")
    return has(root, *parts) and len(attentions(root.decoder)) > 1


def _matches(root: Any) -> bool:
    return _alternates(root) and all(
        is_fused_attention(attn, _ARGUMENTS) for attn in _attention(root).values()
    )


def _explain_mismatch(root: Any) -> str | None:
    if not _alternates(root):
        return None
    return unlike(next(iter(_attention(root).values())), _ARGUMENTS, "π³")


def _attention(root: Any) -> dict[str, nn.Module]:
    modules = attentions(root.decoder)
    return {f"decoder.{i}.attn": modules[i] for i in range(1, len(modules), 2)}


def _layout(root: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, TokenLayout]:
    images = clip_images(args, kwargs, "imgs", "model")
    height, width = images.shape[3] // root.patch_size, images.shape[4] // root.patch_size
    getter = getattr(root, "position_getter", None)
    if getter is not None:
        where = "position_getter.cache_positions"
        refuse_stale_positions(getter.cache_positions, (height, width), images.device, where)
    return images.shape[0], TokenLayout(
        frames=images.shape[1], height=height, width=width, special=root.patch_start_idx
    )


def _reduced_forward(
    attn: Any,
    layout: TokenLayout,
    rule: ResolvedRule,
    x: Tensor,
    attn_bias: Tensor | None = None,
    xpos: Tensor | None = None,
) -> Tensor:
    refuse_argument(attn, "attn_bias", attn_bias)
    refuse_dropout(attn)
    prepare = partial(
        normalise_and_rotate, attn, layout, rotary=attn.rope is not None, cast_first=True
    )
    return reduced_attention(attn, layout, rule, x, prepare, pinned_kernels)


def _predict(output: Any, images: Tensor) -> Prediction:
    points, logits, poses = first_clip(output, "local_points", "conf", "camera_poses")
    return Prediction.from_local_points(points, logits.sigmoid(), poses)


def _metadata(root: Any) -> dict[str, int]:
    return {"patch_size": root.patch_size, "special_tokens": root.patch_start_idx}


def _sharding(root: Any, exchange: Exchange) -> tuple[Replacement, ...]:
    if has(root, "metric_decoder"):
        raise FamilyError(
            "Pi3X's metric decoder attends over all frames, so several processes cannot share a "
            "clip: use Pi3, or one process"
        )
    return ()  # nothing else couples frames


FAMILY = Family(
    name="pi3",
    usage="model(images) with images [B, N, 3, H, W], not model.forward or model.decode",
    matches=_matches,
    explain_mismatch=_explain_mismatch,
    attention=_attention,
    entry=lambda root: root,
    layout=_layout,
    reduced_forward=_reduced_forward,
    frame_attention=lambda root: fused_attentions(root.decoder, _ARGUMENTS)[::2],
    frame_forward=_reduced_forward,
    predict=_predict,
    preprocess=first_image_area,
    metadata=_metadata,
    compile_fixes=without_waiting,
    memory_savers=memory_savers,
    prediction_savers=prediction_savers,
    sharding=_sharding,
)
