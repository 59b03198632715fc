"""Depth metrics: AbsRel, δ < 1.25 and the mean absolute log ratio, unaligned or median-aligned.

AbsRel and δ are those of Eigen et al. (arXiv 1406.2283). Alignment multiplies the prediction by
the median of the per-pixel ratio target ÷ prediction, over the clip or per frame. The median ratio
is the scale that minimises the mean absolute log ratio, which is our deviation of depth.
(Monodepth2's evaluation takes the ratio of the two medians instead.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DepthAlignment = Literal["none", "clip", "frame"]


@dataclass(frozen=True)
class DepthMetrics:
    """Depth metrics of one clip, pooled over its valid pixels.

    Attributes:
        abs_rel: Mean of |prediction - target| ÷ target, a fraction.
        delta_125: Share of pixels whose ratio lies in (1 ÷ 1.25, 1.25), a fraction.
        log_ratio: Mean of |log(prediction ÷ target)|, natural logarithm. With ``align="clip"``
            and the dense run as target this is the deviation of depth.
        pixels: Number of valid pixels.
    """

    abs_rel: float
    delta_125: float
    log_ratio: float
    pixels: int


def _log_ratio(predicted: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """Return log(target ÷ predicted), ``[S, H, W]``, NaN exactly at invalid pixels."""
    if predicted.dim() != 3 or predicted.shape != target.shape:
        raise ValueError(
            "depth: expected two tensors of one shape [S, H, W], found "
            f"{list(predicted.shape)} and {list(target.shape)}"
        )
    if valid is not None and valid.shape != target.shape:
        raise ValueError(f"valid: expected shape {list(target.shape)}, found {list(valid.shape)}")
    usable = torch.isfinite(target) & (target > 0)
    if valid is not None:
        usable = usable & valid.bool()
    if not bool(usable.any()):
        raise ValueError("depth: no valid pixel (the target is positive and finite nowhere)")
    wrong = int((usable & ~(torch.isfinite(predicted) & (predicted > 0))).sum())
    if wrong:
        raise ValueError(
            f"depth: {wrong} of {int(usable.sum())} valid pixels have a predicted depth that is "
            "not positive and finite"
        )
    dtype = torch.promote_types(torch.promote_types(predicted.dtype, target.dtype), torch.float32)
    ratio = target.to(dtype).log() - predicted.to(dtype).log()
    return torch.where(usable, ratio, torch.full_like(ratio, math.nan))


def _median_log_ratio(log_ratio: Tensor, align: DepthAlignment) -> Tensor:
    """Return offsets that broadcast to ``[S, H, W]``; a frame without a valid pixel has 0."""
    if align == "none":
        return log_ratio.new_zeros(1, 1, 1)
    if align == "clip":
        return log_ratio.nanmedian().reshape(1, 1, 1)
    if align == "frame":
        return log_ratio.flatten(1).nanmedian(dim=1).values.nan_to_num(nan=0.0)[:, None, None]
    raise ValueError(f"align: expected 'none', 'clip' or 'frame', found {align!r}")


def median_scale(
    predicted: Tensor,
    target: Tensor,
    valid: Tensor | None = None,
    *,
    align: DepthAlignment = "clip",
) -> Tensor:
    """Return the scale that aligns predicted depth: the median of target ÷ prediction.

    Args:
        predicted: Depth ``[S, H, W]``, positive at valid pixels.
        target: Depth ``[S, H, W]``; pixels that are not positive and finite are ignored.
        valid: Mask ``[S, H, W]`` of the pixels to use, or None for all.
        align: ``"clip"`` for one scale, ``"frame"`` for one per frame, ``"none"`` for scale 1.

    Returns:
        ``[1, 1, 1]`` or ``[S, 1, 1]`` factors for the prediction. A frame without a valid pixel
        has factor 1.

    Raises:
        ValueError: If shapes differ, no pixel is valid, or the prediction of a valid pixel is not
            positive and finite.
    """
    return _median_log_ratio(_log_ratio(predicted, target, valid), align).exp()


def depth_metrics(
    predicted: Tensor,
    target: Tensor,
    valid: Tensor | None = None,
    *,
    align: DepthAlignment = "none",
) -> DepthMetrics:
    """Return AbsRel, δ < 1.25 and mean |log ratio| of one clip.

    Args:
        predicted: Depth ``[S, H, W]``, positive at valid pixels.
        target: Depth ``[S, H, W]``; pixels that are not positive and finite are ignored.
        valid: Mask ``[S, H, W]`` of the pixels to use, or None for all.
        align: Median alignment of the prediction: none, one scale per clip, or one per frame.

    Returns:
        The metrics. Means are accumulated in float64.

    Raises:
        ValueError: If shapes differ, no pixel is valid, or the prediction of a valid pixel is not
            positive and finite.
    """
    log_ratio = _log_ratio(predicted, target, valid)
    offset = _median_log_ratio(log_ratio, align)
    usable = ~log_ratio.isnan()
    # log(aligned prediction ÷ target); 0 at invalid pixels, which then add nothing to the sums.
    log_ratio = torch.where(usable, offset - log_ratio, torch.zeros_like(log_ratio))
    pixels = int(usable.sum())
    absolute = log_ratio.abs()
    close = usable & (absolute < math.log(1.25))
    return DepthMetrics(
        abs_rel=float(log_ratio.expm1().abs().sum(dtype=torch.float64)) / pixels,
        delta_125=int(close.sum()) / pixels,
        log_ratio=float(absolute.sum(dtype=torch.float64)) / pixels,
        pixels=pixels,
    )


def log_depth_deviation(predicted: Tensor, dense: Tensor, valid: Tensor | None = None) -> float:
    """Return the deviation of depth: mean |log ratio| to dense after one median scale per clip.

    Args:
        predicted: Depth of the reduced run, ``[S, H, W]``.
        dense: Depth of the dense run, ``[S, H, W]``.
        valid: Mask ``[S, H, W]`` of the pixels to use, or None for all.

    Returns:
        The deviation, dimensionless (0.01 is about one percent).

    Raises:
        ValueError: In the cases of `depth_metrics`.
    """
    return depth_metrics(predicted, dense, valid, align="clip").log_ratio
