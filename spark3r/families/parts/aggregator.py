"""The common part of VGGT, VGGT-Omega and the reference model: an aggregator before the heads.

The tokens of a frame are its camera and register tokens and then its patches. Frame 0 has camera
and register tokens of its own. The heads return depth, its confidence and VGGT's pose encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...layout import TokenLayout
from ...prediction import Prediction
from .outputs import first_clip
from .recognition import clip_images, refuse_stale_positions


def layout(
    aggregator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, start: str
) -> tuple[int, TokenLayout]:
    """Return batch size and token layout of an aggregator's call.

    Args:
        aggregator: Module that takes images ``[B, S, 3, H, W]``.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        start: Name of the aggregator's attribute that counts the tokens before a frame's first
            patch.

    Raises:
        LayoutError: If the images have another shape, or cached positions lie on another device.
    """
    images = clip_images(args, kwargs, "images", "aggregator")
    patch = aggregator.patch_size
    height, width = images.shape[3] // patch, images.shape[4] // patch
    getter = getattr(aggregator, "position_getter", None)
    if getter is not None:
        where = "aggregator.position_getter.position_cache"
        refuse_stale_positions(getter.position_cache, (height, width), images.device, where)
    special: int = getattr(aggregator, start)
    return images.shape[0], TokenLayout(
        frames=images.shape[1], height=height, width=width, special=special, anchor_frame=0
    )


def metadata(aggregator: Any, *, start: str) -> dict[str, int]:
    """Return patch size and special tokens per frame. ``start`` is that of `layout`."""
    return {"patch_size": aggregator.patch_size, "special_tokens": getattr(aggregator, start)}


def predict(output: Any, images: Tensor, *, pixel_centre: float = 0.0) -> Prediction:
    """Return the prediction for a clip, from depth and cameras.

    Args:
        output: Output of the model.
        images: Images of the clip, ``[S, 3, H, W]``.
        pixel_centre: Offset of the sampled point inside a pixel, in pixels; 0 as in VGGT, which
            unprojects whole pixels.

    Raises:
        FamilyError: If an output is missing.
    """
    # Depth and cameras agree better than a point head does (VGGT's README).
    depth, confidence, pose = first_clip(output, "depth", "depth_conf", "pose_enc")
    return Prediction.from_pose_encoding(depth, confidence, pose, pixel_centre=pixel_centre)
