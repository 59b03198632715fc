"""The Triton kernel of `nearest`. Importing it needs Triton."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

SOURCES, DESTINATIONS = 64, 64
"""Sources of one program, and destinations that it compares them with at a time."""


def launch(source: Tensor, destination: Tensor) -> Tensor:
    """Run the kernel; see `nearest.apply`."""
    batch, groups, sources, features = source.shape
    destinations = destination.shape[2]
    source, destination = source.contiguous(), destination.contiguous()
    found = torch.empty((batch, groups, sources), dtype=torch.int64, device=source.device)
    tiles = triton.cdiv(sources, SOURCES)
    programs = batch * groups * tiles
    if programs:
        on_device = torch.cuda.device(source.device) if source.is_cuda else nullcontext()
        with on_device:
            _nearest[(programs,)](
                source,
                destination,
                found,
                sources,
                destinations,
                FEATURES=features,
                SOURCES=SOURCES,
                DESTINATIONS=DESTINATIONS,
                enable_fp_fusion=True,
            )
    return found


@triton.jit
def _nearest(  # type: ignore[no-untyped-def]
    source,
    destination,
    found,
    sources,
    destinations,
    FEATURES: tl.constexpr,
    SOURCES: tl.constexpr,
    DESTINATIONS: tl.constexpr,
):
    tiles = tl.cdiv(sources, SOURCES)
    program = tl.program_id(0)
    group = (program // tiles).to(tl.int64)
    row = (program % tiles) * SOURCES + tl.arange(0, SOURCES)
    column = tl.arange(0, DESTINATIONS)
    feature = tl.arange(0, FEATURES)
    # Offsets count in 64 bits from the group on: a long clip has many groups.
    source += group * sources * FEATURES
    destination += group * destinations * FEATURES
    inside = row < sources
    own = tl.load(
        source + row[:, None] * FEATURES + feature[None, :], mask=inside[:, None], other=0.0
    )
    # Each place of the tile keeps the best of its columns; the places are compared in the end.
    best = tl.full((SOURCES, DESTINATIONS), float("-inf"), dtype=tl.float32)
    place = tl.zeros((SOURCES, DESTINATIONS), dtype=tl.int32)
    for start in range(0, destinations, DESTINATIONS):
        number = start + column
        there = number < destinations
        other = tl.load(
            destination + number[None, :] * FEATURES + feature[:, None],
            mask=there[None, :],
            other=0.0,
        )
        # Three products in TF32 are as exact as one in float32, and several times as fast.
        similarity = tl.dot(own, other, input_precision="tf32x3")
        similarity = tl.where(there[None, :], similarity, float("-inf"))
        better = similarity > best  # equal ones leave the first
        best = tl.where(better, similarity, best)
        place = tl.where(better, number[None, :], place)
    most = tl.max(best, axis=1)
    first = tl.min(tl.where(best == most[:, None], place, 2147483647), axis=1)
    # No similarity of a query with NaN is the largest; its place must exist all the same.
    first = tl.where(first < destinations, first, 0)
    tl.store(found + group * sources + row, first.to(tl.int64), mask=inside)
