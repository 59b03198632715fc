"""Pictures of frames for a page: each frame beside its depth, small enough for all to fit."""

from __future__ import annotations

import io
from base64 import b64encode

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..io.depth_maps import coloured_depth, depth_range
from ..prediction import Prediction

_LARGEST = 320  # width of a frame in pixels
_QUALITY = 75  # of JPEG
_MOST = 256  # pictures


def frame_pictures(
    images: Tensor, prediction: Prediction, dense: Prediction | None, max_bytes: int
) -> dict[str, str]:
    """Return pictures as base64 of JPEG by the number of their frame, evenly spread.

    Each shows a frame, the dense depth if there is one, and the depth of the prediction. All frames
    have one if they take less than ``max_bytes`` together; otherwise every second, fourth ... has.
    """
    every = max(1, -(-prediction.frames // _MOST))
    ranges = depth_range(prediction.depth), depth_range((dense or prediction).depth)
    pictures = {}
    for number in range(0, prediction.frames, every):
        parts = [(images[number] * 255).round().byte().permute(1, 2, 0).numpy()]
        if dense is not None:
            parts.append(coloured_depth(dense.depth[number], *ranges[1]))
        parts.append(coloured_depth(prediction.depth[number], *ranges[0]))
        pictures[str(number)] = _jpeg(parts)
    while len(pictures) > 1 and sum(map(len, pictures.values())) > max_bytes:
        pictures = dict(list(pictures.items())[::2])
    return pictures


def _jpeg(parts: list[NDArray[np.uint8]]) -> str:
    from PIL import Image

    height, width = parts[0].shape[:2]
    size = (min(width, _LARGEST), max(1, round(height * min(1.0, _LARGEST / width))))
    resized = [np.asarray(Image.fromarray(part).resize(size)) for part in parts]
    content = io.BytesIO()
    Image.fromarray(np.concatenate(resized, axis=1)).save(content, "JPEG", quality=_QUALITY)
    return b64encode(content.getvalue()).decode("ascii")
