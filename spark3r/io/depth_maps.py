"""Depth as colours: near is bright, and one scale holds for the whole clip."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..metrics.points import spread_indices

_SAMPLED = 1_000_000  # pixels, spread evenly, from which the range is read
_CLIPPED = 0.02  # share of pixels beyond either end of the range

# From far to near: dark blue, violet, orange, light yellow. Lightness only increases, so that the
# map also works in grey.
_RED = (8, 53, 122, 190, 236, 251, 252)
_GREEN = (12, 24, 34, 55, 105, 172, 240)
_BLUE = (48, 110, 129, 104, 62, 55, 160)


def depth_range(depth: Tensor) -> tuple[float, float]:
    """Return the near and the far end of a clip's depth ``[S, H, W]``, without its extremes."""
    values = depth.flatten()
    values = values[spread_indices(len(values), _SAMPLED)].float()
    values = values[values > 0].sort().values
    if len(values) == 0:
        return 1.0, 1.0
    last = len(values) - 1
    return float(values[round(_CLIPPED * last)]), float(values[round((1 - _CLIPPED) * last)])


def coloured_depth(depth: Tensor, near: float, far: float) -> NDArray[np.uint8]:
    """Return colours ``[H, W, 3]`` uint8 of one frame's depth ``[H, W]``.

    Colours follow inverse depth from ``1 / far`` to ``1 / near``. Pixels whose depth is not
    positive are black.
    """
    inverse = 1 / depth.float().clamp(min=torch.finfo(torch.float32).tiny)
    span = 1 / near - 1 / far
    position = ((inverse - 1 / far) / span if span > 0 else torch.full_like(inverse, 0.5)).clamp(
        0, 1
    )
    steps = np.linspace(0, 1, len(_RED))
    channels = [np.interp(position.numpy(), steps, levels) for levels in (_RED, _GREEN, _BLUE)]
    colours = np.stack(channels, axis=-1).round().astype(np.uint8)
    colours[(depth <= 0).numpy()] = 0
    return colours
