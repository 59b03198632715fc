"""The cloud of an export: confident pixels of all frames, seen from the cameras that it writes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..reading import Output
from .tracks import Cameras, Floats

__all__ = ["coloured_cloud"]

_SAMPLED = 1000  # pixels of each frame, from which the threshold of confidence is read


def coloured_cloud(
    output: Output, cameras: Cameras, max_points: int, least_confident_percent: float
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return points ``[N, 3]`` of confident pixels, spread evenly over the frames, and colours.

    Args:
        output: The reconstruction.
        cameras: The cameras that place the depth maps, at the size of the originals.
        max_points: Largest number of points.
        least_confident_percent: Share of pixels to leave out, 0 to below 100.
    """
    frames = len(output.frames)
    sampled = [
        _spread(output.confidence(number).numpy().ravel(), _SAMPLED) for number in range(frames)
    ]
    threshold = np.quantile(np.concatenate(sampled), least_confident_percent / 100, method="lower")
    points, colours = [], []
    for number in range(frames):
        depth, confidence = output.depth(number).numpy(), output.confidence(number).numpy()
        chosen = np.flatnonzero((confidence.ravel() >= threshold) & (depth.ravel() > 0))
        chosen = _spread(chosen, max(1, max_points // frames))
        rows, columns = np.divmod(chosen, depth.shape[1])
        points.append(_placed(output, cameras, number, rows, columns, depth[rows, columns]))
        colours.append(output.colours(number)[rows, columns])
    return np.concatenate(points)[:max_points], np.concatenate(colours)[:max_points]


def _placed(
    output: Output,
    cameras: Cameras,
    number: int,
    rows: NDArray[np.intp],
    columns: NDArray[np.intp],
    depth: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Return the world points of some pixels of a depth map."""
    transform, matrix = output.transforms[number], cameras.intrinsics[number]
    (right_scale, down_scale), (right, down) = transform.scale, transform.offset
    x = (columns + 0.5 - right) / right_scale
    y = (rows + 0.5 - down) / down_scale
    rays = np.stack(
        [(x - matrix[0, 2]) / matrix[0, 0], (y - matrix[1, 2]) / matrix[1, 1], np.ones(len(x))], 1
    )
    local: Floats = rays * depth[:, None]
    world = local @ cameras.extrinsics[number, :, :3] + cameras.centres[number]
    return world.astype(np.float32)


def _spread(values: NDArray, count: int) -> NDArray:  # type: ignore[type-arg]
    if len(values) <= count:
        return values
    return values[np.linspace(0, len(values) - 1, count).round().astype(np.int64)]
