"""Consistency: how far a run's depths and poses contradict each other. It needs no ground truth.

The depth of each key frame is unprojected, moved by the predicted poses into every other key frame,
and compared with the depth predicted there. The figure is the median |log ratio| over the pixels
that land in view and in front of the camera, averaged over the ordered pairs of frames. Occluded
pixels land in view too, and do not matter to the median while they are fewer than half.

Cameras that stop moving and depth that flattens are perfectly consistent. So `ConsistencyMetrics`
also has the spreads that vanish in a collapse, and `collapsed` compares them with those of the
dense run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import camera_centres, check_finite, check_shape, invert_pose, pixel_grid
from .pose import frame_pairs, rotation_angle_deg

# Pixels warped at once; a warp keeps about ten floats per pixel.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class ConsistencyMetrics:
    """Consistency of one run, and the figures that reveal a collapse.

    Attributes:
        log_ratio: Median |log ratio| of warped and predicted depth, averaged over the ordered pairs
            with at least `min_visible` of the pixels in view; None if there is no such pair.
        visible: Share of pixels that land in view, averaged over all ordered pairs, a fraction.
        pairs: Number of ordered pairs that entered `log_ratio`.
        camera_spread: Root mean square distance of the key cameras from their centroid, divided by
            the median depth. It vanishes when cameras stop moving.
        rotation_spread_deg: Mean angle between the orientations of two key cameras, degrees.
        depth_spread: Standard deviation of log depth inside a frame, averaged over the key frames.
            It vanishes when depth flattens.
    """

    log_ratio: float | None
    visible: float
    pairs: int
    camera_spread: float
    rotation_spread_deg: float
    depth_spread: float


def key_frame_indices(frames: int, count: int) -> list[int]:
    """Return evenly spaced frames, with the first and the last.

    Args:
        frames: Number of frames of the clip.
        count: Largest number of key frames, at least 1.

    Returns:
        ``min(frames, count)`` increasing indices.

    Raises:
        ValueError: If a number is below 1.
    """
    if frames < 1 or count < 1:
        raise ValueError(f"expected at least one frame, found {frames} frames, {count} key frames")
    count = min(frames, count)
    # Integer arithmetic, halves rounded up: the same frames on every machine.
    steps = max(count - 1, 1)
    return [(2 * k * (frames - 1) + steps) // (2 * steps) for k in range(count)]


def _warp_disagreement(
    source_depth: Tensor,
    source_valid: Tensor,
    target_inverse: Tensor,
    target_valid: Tensor,
    matrix: Tensor,
    offset: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return median |log ratio| and visible share of a chunk of pairs, ``[P]`` each.

    The median is NaN if nothing is visible. Depths are ``[P, H, W]``, the matrix is K_j R K_i⁻¹,
    ``[P, 3, 3]``, and the offset K_j t, ``[P, 3]``.
    """
    height, width = source_depth.shape[-2:]
    grid = pixel_grid(height, width, like=source_depth).flatten(0, 1)
    warped = source_depth.flatten(1)[..., None] * (grid @ matrix.transpose(-1, -2))
    warped = warped + offset[:, None, :]
    depth = warped[..., 2]
    in_front = depth > 0
    safe = torch.where(in_front, depth, torch.ones_like(depth))
    size = warped.new_tensor([width, height])
    # grid_sample with align_corners=False has pixel centres at half-integers, as `pixel_grid` has.
    where = 2 * warped[..., :2] / safe[..., None] / size - 1
    seen = in_front & (where.abs() <= 1).all(dim=-1)
    where = torch.where(seen[..., None], where, torch.zeros_like(where))
    # Inverse depth is linear in the image on planes, so interpolating it is exact on them.
    planes = torch.stack((target_inverse, target_valid.to(target_inverse)), dim=1)
    sampled = torch.nn.functional.grid_sample(
        planes, where[:, None], mode="bilinear", padding_mode="border", align_corners=False
    )[:, :, 0]
    # A pixel counts only if all four neighbours it is interpolated from are valid.
    seen = seen & source_valid.flatten(1) & (sampled[:, 1] > 0.999)
    ratio = (safe * torch.where(seen, sampled[:, 0], torch.ones_like(safe))).log().abs()
    ratio = torch.where(seen, ratio, torch.full_like(ratio, math.nan))
    usable = source_valid.flatten(1).sum(dim=1).clamp(min=1)
    return ratio.nanmedian(dim=1).values, seen.sum(dim=1) / usable


def consistency_metrics(
    depth: Tensor,
    intrinsics: Tensor,
    extrinsics: Tensor,
    valid: Tensor | None = None,
    *,
    key_frames: int | Sequence[int] = 8,
    min_visible: float = 0.01,
) -> ConsistencyMetrics:
    """Return the consistency of the depths and poses of one run.

    Args:
        depth: Z-depth ``[S, H, W]``, positive and finite at valid pixels.
        intrinsics: Intrinsics ``[S, 3, 3]`` in pixels.
        extrinsics: World-to-camera extrinsics ``[S, 3, 4]``.
        valid: Mask ``[S, H, W]`` of pixels to compare (without sky, for example), or None for all.
        key_frames: Number of evenly spaced frames to compare, or the frames themselves.
        min_visible: Least share of pixels in view, as a fraction. Other pairs are left out of the
            average, because the median of a few pixels is noise.

    Returns:
        The consistency and its guards. `log_ratio` is None for one frame, or if no two frames see
        the same place.

    Raises:
        ValueError: If shapes are wrong, a camera is NaN or infinite, or a valid depth is not
            positive and finite.
    """
    check_shape("depth", depth, (None, None, None))
    frames = len(depth)
    for name, tensor, shape in (
        ("intrinsics", intrinsics, (frames, 3, 3)),
        ("extrinsics", extrinsics, (frames, 3, 4)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, found {list(tensor.shape)}")
        check_finite(name, tensor)
    if valid is not None and valid.shape != depth.shape:
        raise ValueError(f"valid: expected {list(depth.shape)}, found {list(valid.shape)}")
    chosen = key_frame_indices(frames, key_frames) if isinstance(key_frames, int) else key_frames
    index = torch.as_tensor(list(chosen), dtype=torch.long, device=depth.device)
    depth = depth[index].to(torch.promote_types(depth.dtype, torch.float32))
    usable = torch.ones_like(depth, dtype=torch.bool) if valid is None else valid[index].bool()
    wrong = int((usable & ~(torch.isfinite(depth) & (depth > 0))).sum())
    if wrong:
        raise ValueError(f"depth: {wrong} valid values are not positive and finite")
    if not bool(usable.any()):
        raise ValueError("depth: no valid pixel")
    depth = torch.where(usable, depth, torch.ones_like(depth))
    intrinsics, extrinsics = intrinsics[index].double(), extrinsics[index].double()
    low, high = frame_pairs(len(index), depth.device)
    source, target = torch.cat((low, high)), torch.cat((high, low))
    median, share = disagreement(depth, intrinsics, extrinsics, source, target, usable)
    counted = median[share >= max(min_visible, 1e-9)]
    return ConsistencyMetrics(
        log_ratio=float(counted.mean()) if counted.numel() else None,
        visible=float(share.mean()) if share.numel() else 0.0,
        pairs=counted.numel(),
        camera_spread=_camera_spread(extrinsics) / float(depth[usable].median()),
        rotation_spread_deg=_rotation_spread_deg(extrinsics, low, high),
        depth_spread=_depth_spread(depth, usable),
    )


def disagreement(
    depth: Tensor,
    intrinsics: Tensor,
    extrinsics: Tensor,
    source: Tensor,
    target: Tensor,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return how far the depths of pairs of frames contradict each other.

    Args:
        depth: Z-depth ``[S, H, W]``, positive and finite at valid pixels.
        intrinsics: Intrinsics ``[S, 3, 3]`` in pixels.
        extrinsics: World-to-camera extrinsics ``[S, 3, 4]``.
        source: Frames whose pixels are moved, ``[P]`` int64.
        target: Frames that they are moved into, ``[P]`` int64.
        valid: Mask ``[S, H, W]`` of pixels to compare, or None for all.

    Returns:
        The median |log ratio| of each pair, ``[P]`` float64, NaN if no pixel lands in view; and the
        share of pixels that do, ``[P]`` float64.
    """
    height, width = depth.shape[1:]
    usable = torch.ones_like(depth, dtype=torch.bool) if valid is None else valid
    depth = torch.where(usable, depth, torch.ones_like(depth))
    intrinsics, extrinsics = intrinsics.double(), extrinsics.double()
    # Pixels of frame i go to frame j by z' (u', v', 1) = z · K_j R K_i⁻¹ (u, v, 1) + K_j t.
    to_world = invert_pose(extrinsics)
    back = to_world[:, :3, :3] @ torch.linalg.inv(intrinsics)
    rotation, shift = extrinsics[target, :, :3], extrinsics[target, :, 3:]
    matrix = (intrinsics[target] @ rotation @ back[source]).to(depth.dtype)
    offset = intrinsics[target] @ (rotation @ to_world[source, :, 3:] + shift)
    offset = offset.squeeze(-1).to(depth.dtype)

    inverse = 1 / depth
    medians, shares = [depth.new_zeros(0)], [depth.new_zeros(0)]
    step = max(1, _CHUNK // (height * width))
    for begin in range(0, len(source), step):
        part = slice(begin, begin + step)
        i, j = source[part], target[part]
        median, share = _warp_disagreement(
            depth[i], usable[i], inverse[j], usable[j], matrix[part], offset[part]
        )
        medians.append(median)
        shares.append(share)
    return torch.cat(medians).double(), torch.cat(shares).double()


def _camera_spread(extrinsics: Tensor) -> float:
    centres = camera_centres(extrinsics)
    return float((centres - centres.mean(dim=0)).square().sum(dim=-1).mean().sqrt())


def _rotation_spread_deg(extrinsics: Tensor, low: Tensor, high: Tensor) -> float:
    angles = rotation_angle_deg(extrinsics[low, :, :3], extrinsics[high, :, :3])
    return float(angles.mean()) if angles.numel() else 0.0


def _depth_spread(depth: Tensor, usable: Tensor) -> float:
    weight = usable.flatten(1).double()
    log_depth = depth.flatten(1).double().log()
    count = weight.sum(dim=1)
    mean = (weight * log_depth).sum(dim=1) / count.clamp(min=1)
    square = (weight * (log_depth - mean[:, None]).square()).sum(dim=1) / count.clamp(min=1)
    return float(square.sqrt()[count > 0].mean())


def collapsed(candidate: ConsistencyMetrics, dense: ConsistencyMetrics) -> tuple[str, ...]:
    """Return the guards which show that a run's consistency comes from a collapse.

    Args:
        candidate: Metrics of the reduced run.
        dense: Metrics of the dense run on the same clip.

    Returns:
        Names of the figures below half of those of the dense run; empty without a collapse.
        A figure that is negligible in the dense run (below 1e-3, or 0.1 degrees for rotation), as
        on footage from a tripod, does not count.
    """
    floors = {
        "camera_spread": 1e-3,
        "rotation_spread_deg": 0.1,
        "depth_spread": 1e-3,
        "visible": 1e-3,
    }
    return tuple(
        name
        for name, floor in floors.items()
        if getattr(dense, name) > floor and getattr(candidate, name) < 0.5 * getattr(dense, name)
    )
