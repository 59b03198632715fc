"""Frames that a reconstruction is probably wrong about, found without ground truth.

Seven figures of each frame, and a rule that makes suspects of them. Most are compared with the
frames around, because footage differs: a wall has less contrast than a shelf everywhere. Figures
and limits were chosen on rendered clips with failures made on purpose, and measured on others
(`benchmarks/suspects.py`).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry import camera_centres
from .consistency import disagreement

OFFSETS = (1, 2, 4)
"""Distances, in frames, of the frames that a frame's depth is compared with."""

LEAST_VISIBLE = 0.15
"""Share of pixels in view below which two frames are not compared."""

NEAR, FAR = 8, 24
"""Frames before and after a frame that its figures are compared with, for what changes quickly and
for what does not."""

LEAST_AROUND = 4
"""Frames that there must be to compare with."""

BLURRED = math.log(1.35)
FEATURELESS = 0.04
DISAGREES, LEAST_DISAGREEMENT = math.log(2.7), 0.03
CUT = math.log(2.5)
JUMPS = math.log(5.5)
FLAT = 0.03

_PIXELS = 48  # rows and columns, at least, that depths are compared at where there are as many


@dataclass(frozen=True)
class FrameFigures:
    """Figures of S frames, each ``[S]`` float64; NaN where there is nothing to compare with.

    Attributes:
        sharpness: Mean |Laplacian| of the brightness ÷ its standard deviation.
        contrast: Standard deviation of the brightness, which is in [0, 1].
        change: Mean difference of colours from the frame before, after averaging over squares of an
            eighth of the image.
        disagreement: Median |log ratio| of depths with frames 1, 2 and 4 before and after, their
            median.
        joint: The same with the frame before alone.
        jump: Distance of the camera from the middle of the cameras before and after ÷ median depth.
        depth_spread: Standard deviation of log depth inside the frame.
    """

    sharpness: Tensor
    contrast: Tensor
    change: Tensor
    disagreement: Tensor
    joint: Tensor
    jump: Tensor
    depth_spread: Tensor


def frame_figures(
    images: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    extrinsics: Tensor,
    *,
    at_once: int = 512,
) -> FrameFigures:
    """Return the figures of the frames of a clip, in the order in which they were recorded.

    Args:
        images: Colours ``[S, 3, H, W]`` in [0, 1].
        depth: Z-depth ``[S, H, W]``; what is not positive and finite is left out.
        intrinsics: Intrinsics ``[S, 3, 3]`` in pixels.
        extrinsics: World-to-camera extrinsics ``[S, 3, 4]``.
        at_once: Frames whose colours are looked at at once, default 512.
    """
    parts = images.split(at_once)
    looks = torch.cat([_looks(part) for part in parts])
    squares = torch.cat([F.adaptive_avg_pool2d(part.float(), 8) for part in parts])
    change = torch.full((len(images),), math.nan, dtype=torch.float64)
    change[1:] = (squares[1:] - squares[:-1]).abs().mean(dim=(1, 2, 3)).double()
    few, cameras = _coarser(depth, intrinsics)
    agreement, joint = _agreement(few, cameras, extrinsics)
    usable = (few.isfinite() & (few > 0)).flatten(1)
    log = few.flatten(1).double().log()
    log[~usable] = math.nan
    square = (log - log.nanmean(dim=1, keepdim=True)).square().nanmean(dim=1)
    centres = camera_centres(extrinsics.double())
    jump = torch.full((len(images),), math.nan, dtype=torch.float64)
    away = (centres[1:-1] - (centres[:-2] + centres[2:]) / 2).norm(dim=1)
    jump[1:-1] = away / log.nanmedian(dim=1).values.exp()[1:-1]
    return FrameFigures(
        sharpness=looks[:, 0],
        contrast=looks[:, 1],
        change=change,
        disagreement=agreement,
        joint=joint,
        jump=jump,
        depth_spread=square.sqrt(),
    )


def suspects(figures: FrameFigures) -> list[tuple[str, ...]]:
    """Return for every frame in words what is suspicious about it; mostly nothing.

    ``featureless`` and ``blurred`` frames show little that could be matched. A frame that
    ``disagrees`` contradicts the depth of those around it, and at a ``cut`` both depth and colours
    do so between a frame and the one before. The camera of a frame that ``jumps`` is far off the
    way of the others. ``flat`` depth has collapsed.
    """
    found: list[list[str]] = [[] for _ in figures.contrast]
    joint = _beyond(figures.joint.log(), FAR)
    change = _beyond((figures.change + 0.01).log(), FAR)
    disagrees = _beyond(figures.disagreement.log(), NEAR) > DISAGREES
    # The camera before one that jumps seems to jump as well, by half as much.
    jump = torch.cat([figures.jump[:1], figures.jump, figures.jump[-1:]]).nan_to_num(0.0)
    peak = figures.jump >= torch.maximum(jump[:-2], jump[2:])
    for word, flags in (
        ("featureless", figures.contrast < FEATURELESS),
        ("blurred", _beyond(-figures.sharpness.log(), NEAR) > BLURRED),
        ("disagrees", disagrees & (figures.disagreement > LEAST_DISAGREEMENT)),
        ("cut", torch.minimum(joint, change) > CUT),
        ("jumps", peak & (_beyond((figures.jump + 1e-4).log(), FAR) > JUMPS)),
        ("flat", figures.depth_spread < FLAT),
    ):
        for number in flags.nonzero().flatten().tolist():
            found[number].append(word)
    return [tuple(words) for words in found]


def _looks(images: Tensor) -> Tensor:
    """Return sharpness and contrast of frames, ``[s, 2]`` float64."""
    brightness = images.float().mean(dim=1, keepdim=True)
    kernel = brightness.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    edges = F.conv2d(brightness, kernel[None, None]).abs().mean(dim=(1, 2, 3)).double()
    contrast = brightness.flatten(1).std(dim=1).double()
    return torch.stack([(edges + 1e-9) / (contrast + 0.01), contrast], dim=1)


def _agreement(depth: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Return the disagreement of every frame with those nearby, and with the one before."""
    frames = len(depth)
    valid = depth.isfinite() & (depth > 0)
    nearby: list[list[float]] = [[] for _ in range(frames)]
    joint = torch.full((frames,), math.nan, dtype=torch.float64)
    for offset in OFFSETS:
        low = torch.arange(max(0, frames - offset))
        high = low + offset
        there, seen = disagreement(depth, intrinsics, extrinsics, low, high, valid)
        back, seen_back = disagreement(depth, intrinsics, extrinsics, high, low, valid)
        both = (there + back) / 2
        both[torch.minimum(seen, seen_back) < LEAST_VISIBLE] = math.nan
        for first, value in enumerate(both.tolist()):
            if not math.isnan(value):
                nearby[first].append(value)
                nearby[first + offset].append(value)
        if offset == 1:
            joint[1:] = both
    medians = [statistics.median_low(each) if each else math.nan for each in nearby]
    return torch.tensor(medians, dtype=torch.float64), joint


def _coarser(depth: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Return depth of every few rows and columns, and the intrinsics of such images."""
    rows, columns = (max(1, side // _PIXELS) for side in depth.shape[1:])
    few = depth[:, rows // 2 :: rows, columns // 2 :: columns].float()
    return few, intrinsics * intrinsics.new_tensor([1 / columns, 1 / rows, 1.0])[:, None]


def _beyond(values: Tensor, around: int) -> Tensor:
    """Return by how much each value exceeds the median of those around it.

    It is 0 where the value is not known, or fewer than `LEAST_AROUND` of the others are.
    """
    found = torch.zeros_like(values)
    for number in range(len(values)):
        before = values[max(0, number - around) : number]
        after = values[number + 1 : number + 1 + around]
        others = torch.cat([before, after])
        if int(others.isfinite().sum()) >= LEAST_AROUND:
            found[number] = values[number] - others.nanmedian()
    return found.nan_to_num(0.0)
