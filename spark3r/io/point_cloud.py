"""A coloured point cloud, as binary PLY."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..metrics.points import spread_indices
from ..prediction import Prediction

_SAMPLED = 1_000_000  # pixels, spread evenly, from which the confidence threshold is read

Pixels = tuple[Tensor, Tensor, Tensor]
"""Frame, row and column of some pixels, each ``[N]`` int64."""

VERTEX = np.dtype(
    [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")]
)


def coloured_points(
    prediction: Prediction,
    images: Tensor,
    max_points: int,
    least_confident_percent: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the points of confident pixels, spread evenly over the clip, and their colours.

    Args:
        prediction: Points and confidence of the clip.
        images: ``[S, 3, H, W]`` in [0, 1].
        max_points: Largest number of points.
        least_confident_percent: Share of pixels to leave out, 0 to below 100.
        mask: ``[S, H, W]`` bool, False where a pixel makes no point; None takes all. The share is
            then one of the used pixels.

    Returns:
        ``[N, 3]`` float32 and ``[N, 3]`` uint8.
    """
    pixels = confident_pixels(prediction, max_points, least_confident_percent, mask)
    return prediction.points[pixels].float(), pixel_colours(images, pixels)


def pixel_colours(images: Tensor, pixels: Pixels) -> Tensor:
    """Return the colours ``[N, 3]`` uint8 of some pixels of images ``[S, 3, H, W]`` in [0, 1]."""
    frame, row, column = pixels
    return (images[frame, :, row, column] * 255).round().to(torch.uint8)


def confident_pixels(
    prediction: Prediction,
    max_points: int,
    least_confident_percent: float,
    mask: Tensor | None = None,
) -> Pixels:
    """Return frame, row and column of confident pixels, in order, spread evenly over the clip.

    The arguments are those of `coloured_points`.
    """
    confidence = prediction.confidence.flatten().float()
    share = least_confident_percent / 100
    used = None if mask is None else mask.flatten()
    places = spread_indices(len(confidence), _SAMPLED)
    places = places if used is None else places[used[places]]
    sampled = confidence[places].sort().values
    # There may be no used pixel among those that were sampled.
    last = min(len(sampled) - 1, math.floor(share * len(sampled)))
    threshold = sampled[last] if len(sampled) else -math.inf
    # About max_points of these candidates are confident. An index of every pixel of a long clip
    # would not fit into memory.
    used_share = 1.0 if used is None else float(used.float().mean())
    wanted = math.ceil(max_points / (1 - share) / used_share)
    candidates = spread_indices(len(confidence), wanted)
    candidates = candidates if used is None else candidates[used[candidates]]
    kept = candidates[confidence[candidates] >= threshold]
    kept = kept[spread_indices(len(kept), max_points)]
    height, width = prediction.image_size
    frame, pixel = kept // (height * width), kept % (height * width)
    return frame, pixel // width, pixel % width


def write_ply(path: Path, points: Tensor, colours: Tensor, comments: Sequence[str] = ()) -> None:
    """Write points ``[N, 3]`` and their colours ``[N, 3]`` uint8 as binary little-endian PLY.

    Args:
        path: The file.
        points: The points.
        colours: Their colours.
        comments: Lines of ASCII for the header.
    """
    vertices = np.empty(len(points), VERTEX)
    for axis, name in enumerate(("x", "y", "z")):
        vertices[name] = points[:, axis].numpy()
    for channel, name in enumerate(("red", "green", "blue")):
        vertices[name] = colours[:, channel].numpy()
    kinds = {"<f4": "float", "|u1": "uchar"}
    header = [
        "ply",
        "format binary_little_endian 1.0",
        *(f"comment {line}" for line in comments),
        f"element vertex {len(points)}",
        *(f"property {kinds[VERTEX[name].str]} {name}" for name in VERTEX.names or ()),
        "end_header",
    ]
    with path.open("wb") as file:
        file.write(("\n".join(header) + "\n").encode("ascii"))
        file.write(vertices.tobytes())
