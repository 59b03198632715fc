"""Evenly spread subsets of the patches of a clip, one in ``factor``, moving from frame to frame.

Patch (y, x) of frame f belongs to the subset when (x + k·y + c·f) mod r = 0. The row shift k makes
the subset of one frame as even as a lattice can be. The frame shift c is coprime to r, so that r
consecutive frames visit every patch once, and large, so that neighbouring frames differ. For r = 2
this is a checkerboard that flips with each frame. It extends the deterministic region sampling of
Spark3R §IV-B to any integer r.
"""

from __future__ import annotations

from functools import cache
from math import gcd

import torch
from torch import Tensor


@cache
def row_shift(factor: int) -> int:
    """Return the k that maximises the least distance between two patches of one frame."""
    return max(range(factor), key=lambda k: (_shortest_squared(factor, k), -k))


@cache
def frame_shift(factor: int) -> int:
    """Return the c, coprime to ``factor``, nearest to the golden section of ``factor``."""
    golden = factor * (5**0.5 - 1) / 2
    coprime = (c for c in range(1, factor + 1) if gcd(c, factor) == 1)
    return min(coprime, key=lambda c: (abs(c - golden), c))


def residues(frames: int, height: int, width: int, factor: int) -> Tensor:
    """Return (x + k·y + c·f) mod r of every patch, ``[frames, height * width]`` int64 on the CPU.

    Residue 0 marks the subset. Every other residue marks a subset of the same spread.
    """
    f = torch.arange(frames, device="cpu").view(-1, 1, 1)
    y = torch.arange(height, device="cpu").view(1, -1, 1)
    x = torch.arange(width, device="cpu").view(1, 1, -1)
    return ((x + row_shift(factor) * y + frame_shift(factor) * f) % factor).flatten(1)


def members(inside: Tensor, height: int, width: int, factor: int) -> Tensor:
    """Return how many patches of each frame belong to the subset, without listing them.

    Args:
        inside: Frame numbers f, int64 of any shape.
        height: Rows of the patch grid.
        width: Columns of the patch grid.
        factor: Reduction factor r.
    """
    of_class = torch.bincount(residues(1, height, width, factor).flatten(), minlength=factor)
    return of_class[-frame_shift(factor) * inside % factor]


def _shortest_squared(factor: int, k: int) -> int:
    """Return the squared length of the shortest vector of {(x, y): x + k·y ≡ 0 mod r} (Gauss)."""
    a, b = (factor, 0), (-k % factor, 1)
    while True:
        if a[0] ** 2 + a[1] ** 2 > b[0] ** 2 + b[1] ** 2:
            a, b = b, a
        norm = a[0] ** 2 + a[1] ** 2
        steps = round((a[0] * b[0] + a[1] * b[1]) / norm)
        if steps == 0:
            return norm
        b = (b[0] - steps * a[0], b[1] - steps * a[1])
