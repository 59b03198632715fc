"""The most similar destination of each source, without writing the similarities.

The plain implementation multiplies all sources of a group by all destinations, writes the product
and reads it again for its largest entries. The fused kernel keeps the largest entry of each source
in registers. Near-ties may fall otherwise than in the plain product, which adds in another order.

`nearest` in `spark3r.reduction.merging` is the plain implementation, `implementation` chooses, and
`nearest_triton` has the kernel.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compiling import assume_constant_result
from . import trials

OPERATION = "matching"
PLAIN, TRITON = "plain", "triton"

FEATURES = (16, 32, 64, 128)
"""Numbers of features that the kernel covers."""


@assume_constant_result
def implementation(device: torch.device, dtype: torch.dtype, features: int) -> str:
    """Return `TRITON` or `PLAIN`.

    The first call with new arguments tries the kernel, outside of any traced region.

    Args:
        device: Device of the features.
        dtype: Precision of the features; the kernel computes in float32 only.
        features: Number of features C.
    """
    possible = device.type == "cuda" and torch.cuda.is_available()
    covered = dtype == torch.float32 and features in FEATURES
    candidates = (TRITON,) if possible and covered else ()
    chosen = trials.choose(OPERATION, candidates, PLAIN, _trial, device, dtype, features)
    if chosen == TRITON:
        _register()
    return chosen


def apply(source: Tensor, destination: Tensor) -> Tensor:
    """Return the number of the destination that has the largest product with each source.

    The kernel runs, and `implementation` must have returned `TRITON`.

    Args:
        source: Features of s sources in each of n groups, float32 ``[B, n, s, C]``.
        destination: Features of d destinations in each group, float32 ``[B, n, d, C]``, d > 0.

    Returns:
        ``[B, n, s]`` int64. Ties go to the first.
    """
    operators: Any = torch.ops.spark3r
    return operators.nearest(source, destination)


@lru_cache(maxsize=1)
def _register() -> torch.library.Library:
    """Define the operator ``spark3r::nearest`` once, so that a compiled graph can hold it."""
    from .nearest_triton import launch

    library = torch.library.Library("spark3r", "FRAGMENT")
    library.define("nearest(Tensor source, Tensor destination) -> Tensor")
    library.impl("nearest", launch, "CUDA")
    library.impl("nearest", launch, "CPU")  # under Triton's interpreter
    library.impl("nearest", _shape, "Meta")
    return library


def _shape(source: Tensor, destination: Tensor) -> Tensor:
    return source.new_empty(source.shape[:3], dtype=torch.int64)


NEAR = 1e-5
"""Largest allowed distance of the chosen product from the largest one, as a share of it."""


def _trial(kernel: str, device: torch.device, dtype: torch.dtype, features: int) -> str | None:
    """Compare the kernel's choices with products in float64, and its ties with their order."""
    _register()
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(1, 2, 71, features, generator=generator)
    # Destinations in clusters: a product that is less precise chooses another of the same cluster.
    centres = torch.randn(1, 2, 7, features, generator=generator).repeat(1, 1, 19, 1)
    apart = 3e-3 * torch.randn(centres.shape, generator=generator)
    destination = F.normalize(centres + apart, dim=-1)
    destination[:, :, 70:] = destination[:, :, :63]  # ties, in the same tile and in another
    destination[:, :, 20:30] = destination[:, :, :10]
    found = apply(source.to(device), destination.to(device)).cpu()
    if found.shape != source.shape[:3] or found.min() < 0 or found.max() >= 133:
        return "it returns numbers of no destination"
    products = source.double() @ destination.double().transpose(2, 3)
    most = products.amax(dim=3)
    short = (most - products.gather(3, found.unsqueeze(3)).squeeze(3)) / most
    if float(short.max()) > NEAR:
        return f"it chooses destinations that are less similar by {float(short.max()):.2g}"
    equal = (destination.unsqueeze(3) == destination.unsqueeze(2)).all(dim=4)
    first = equal.int().argmax(dim=3).gather(2, found)
    if not torch.equal(first, found):
        return "of equally similar destinations it does not choose the first"
    return None
