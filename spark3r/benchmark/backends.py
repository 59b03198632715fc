"""Which kernel computes scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import FamilyError
from ..timing import measure

AUTO, FASTEST = "auto", "fastest"
_KERNELS = {
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}
BACKENDS = (AUTO, FASTEST, *_KERNELS)
"""``auto`` leaves the choice to torch, ``fastest`` times the others on a dense layer."""


@contextmanager
def sdpa_backend(name: str) -> Iterator[None]:
    """Let attention run with the kernel of this name inside the block."""
    if name == AUTO:
        yield
        return
    chosen = [_kernel(name)]
    if name != "math":
        # For what the kernel cannot do: a bias, say.
        chosen += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(chosen):
        yield


def fastest_backend(
    heads: int, tokens: int, dim: int, device: torch.device, dtype: torch.dtype
) -> tuple[str, dict[str, float]]:
    """Return the fastest kernel for dense attention, and milliseconds of those that can run.

    Args:
        heads: Attention heads.
        tokens: Length of the sequence.
        dim: Size of one head.
        device: Where it runs.
        dtype: Precision of queries, keys and values.

    Raises:
        FamilyError: If none can run.
    """
    query = torch.randn(1, heads, tokens, dim, device=device, dtype=dtype)
    ms: dict[str, float] = {}
    for name in _KERNELS:
        if name == "math" and ms:
            continue  # stores all weights: slower than any other, and much larger
        try:
            with torch.inference_mode(), sdpa_kernel([_kernel(name)]):
                taken = measure(
                    lambda: F.scaled_dot_product_attention(query, query, query),
                    device=device,
                    rounds=3,
                    warm_up_s=1e-3,
                )
        except (RuntimeError, AttributeError):
            continue  # not on this device, or not in this version of torch
        ms[name] = taken.median_ms
    if not ms:
        raise FamilyError(f"no attention kernel runs {dtype} with heads of {dim} on {device}")
    return min(ms, key=lambda name: ms[name]), ms


def _kernel(name: str) -> SDPBackend:
    return getattr(SDPBackend, _KERNELS[name])
