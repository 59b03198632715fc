"""Sizes from which on a kernel of PyTorch is wrong without an error."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..errors import LayoutError

MOST_NORMALISED = 2**32
"""Numbers of a tensor from which on CUDA's layer norm returns wrong rows
(https://github.com/pytorch/pytorch/issues/181555)."""

FIXED = (2, 13)
"""First version of torch that is known to have the fix, which was made in April 2026."""


def refuse_wrong_norm(tokens: Tensor, frames: int, version: str = str(torch.__version__)) -> None:
    """Raise an error if CUDA's layer norm of a layer's tokens is wrong.

    Args:
        tokens: Hidden states of all frames, ``[B, N, C]``.
        frames: Frames of the clip.
        version: Version of torch.

    Raises:
        LayoutError: If they are on CUDA, have 2³² or more numbers, and torch lacks the fix.
    """
    if tokens.device.type != "cuda" or tokens.numel() < MOST_NORMALISED:
        return
    numbers = re.findall(r"\d+", version)
    if (int(numbers[0]), int(numbers[1])) >= FIXED:
        return
    fewer = (MOST_NORMALISED - 1) * frames // tokens.numel()
    raise LayoutError(
        f"a clip of {frames} frames has {tokens.numel()} numbers in each layer, and from 2^32 on "
        f"the layer norm of torch {version} on CUDA returns wrong ones: use at most {fewer} "
        f"frames, or torch {FIXED[0]}.{FIXED[1]} or later"
    )
