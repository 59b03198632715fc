"""Which frames see the same part of the scene, by predicted depth and poses."""

from __future__ import annotations

import numpy as np

from ..reading import Output
from .tracks import Bools, Cameras, Floats

__all__ = ["LEAST_OVERLAP", "overlapping_pairs"]

LEAST_OVERLAP = 0.2
"""Least share of a frame that another must show for the two to be compared."""

_PER_FRAME = 24  # other frames that each is compared with
_GRID = 12  # rows and columns of the sampled pixels of each frame
_DEPTH_TOLERANCE = 0.25  # of a point's depth; the rest is hidden behind something


def overlapping_pairs(output: Output, cameras: Cameras) -> list[tuple[int, int]]:
    """Return pairs of frames to compare, each with the lower number first.

    A frame is compared with its successor, and with frames that overlap it by `LEAST_OVERLAP` or
    more. Where there are many, they are taken evenly from the most to the least overlapping, so
    that long baselines are among them.

    Args:
        output: The reconstruction.
        cameras: Its cameras.
    """
    points, depths = _sampled(output, cameras)
    frames = len(points)
    pairs = {(number, number + 1) for number in range(frames - 1)}
    for number in range(frames):
        shared = _shared(points[number], depths, cameras)
        shared[number] = 0
        others = np.flatnonzero(shared >= LEAST_OVERLAP)
        others = others[np.argsort(-shared[others], kind="stable")]
        if len(others) > _PER_FRAME:
            others = others[np.linspace(0, len(others) - 1, _PER_FRAME).round().astype(int)]
        pairs |= {(min(number, int(other)), max(number, int(other))) for other in others}
    return sorted(pairs)


def _sampled(output: Output, cameras: Cameras) -> tuple[Floats, Floats]:
    """Return world points ``[S, G, 3]`` of a grid in each frame, and its depths ``[S, G]``."""
    points, depths = [], []
    for number in range(len(output.frames)):
        whole = output.original_depth(number).numpy()
        rows = ((np.arange(_GRID) + 0.5) * whole.shape[0] / _GRID).astype(int)
        columns = ((np.arange(_GRID) + 0.5) * whole.shape[1] / _GRID).astype(int)
        depth = whole[rows][:, columns].astype(float)
        height, width = cameras.sizes[number]
        x, y = np.meshgrid(
            (columns + 0.5) * width / whole.shape[1], (rows + 0.5) * height / whole.shape[0]
        )
        matrix, pose = cameras.intrinsics[number], cameras.extrinsics[number]
        local = np.stack(
            [(x - matrix[0, 2]) / matrix[0, 0], (y - matrix[1, 2]) / matrix[1, 1], np.ones_like(x)],
            axis=-1,
        )
        local = (local * depth[:, :, None]).reshape(-1, 3)
        points.append(local @ pose[:, :3] + cameras.centres[number])
        depths.append(depth)
    return np.stack(points), np.stack(depths)


def _shared(points: Floats, depths: Floats, cameras: Cameras) -> Floats:
    """Return which share of points ``[G, 3]`` each frame shows, ``[S]``."""
    pose, matrix = cameras.extrinsics, cameras.intrinsics
    size = np.array(cameras.sizes, float)
    seen = points @ pose[:, :, :3].transpose(0, 2, 1) + pose[:, None, :, 3]  # [S, G, 3]
    ahead: Bools = seen[:, :, 2] > 0
    depth = np.where(ahead, seen[:, :, 2], 1.0)
    x = (matrix[:, 0, 0, None] * seen[:, :, 0] / depth + matrix[:, 0, 2, None]) / size[:, 1, None]
    y = (matrix[:, 1, 1, None] * seen[:, :, 1] / depth + matrix[:, 1, 2, None]) / size[:, 0, None]
    inside = ahead & (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    row, column = (np.where(inside, each, 0.0) * _GRID for each in (y, x))
    frame = np.arange(len(pose))[:, None]
    there = depths[frame, row.astype(int), column.astype(int)]
    agree = inside & (np.abs(there - depth) <= _DEPTH_TOLERANCE * depth)
    share: Floats = agree.mean(axis=1)
    return share
