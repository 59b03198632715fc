"""The kernel that computes scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import FamilyError
from ..runner import Runner, autocast, matmul_dtype
from ..sdpa import ReplaceSDPA
from ..timing import measure

AUTO, FASTEST = "auto", "fastest"
_KERNELS = {
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}
BACKENDS = (AUTO, FASTEST, *_KERNELS)
"""``auto`` leaves the choice to torch; ``fastest`` times the others on a dense layer and takes the
fastest."""


@contextmanager
def sdpa_backend(name: str) -> Iterator[None]:
    """Run attention with the kernel of this name inside the block."""
    if name == AUTO:
        yield
        return
    chosen = [_kernel(name)]
    if name != "math":
        # Fallbacks where the kernel cannot run, as with a bias.
        chosen += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(chosen):
        yield


def fastest_backend(runner: Runner, images: Tensor) -> tuple[str, dict[str, float]]:
    """Return the fastest kernel for dense global attention, and milliseconds of each that runs.

    Args:
        runner: An unpatched model.
        images: A clip, ``[S, 3, H, W]``. Queries, keys and values have the shapes of its first
            global attention layer.

    Raises:
        FamilyError: If that layer does not call ``F.scaled_dot_product_attention``, or no kernel
            can run.
    """
    query, key, value = first_sdpa_arguments(runner, images)
    ms: dict[str, float] = {}
    for name in _KERNELS:
        if name == "math" and ms:
            continue  # stores all weights: slower than any other, and much larger
        try:
            with torch.inference_mode(), sdpa_kernel([_kernel(name)]):
                taken = measure(
                    lambda: F.scaled_dot_product_attention(query, key, value),
                    device=runner.device,
                    rounds=3,
                    warm_up_s=1e-3,
                )
        except (RuntimeError, AttributeError):
            continue  # not on this device, or not in this version of torch
        ms[name] = taken.median_ms
    if not ms:
        raise FamilyError(
            f"no attention kernel runs {query.dtype} with heads of {query.shape[-1]} on "
            f"{runner.device}"
        )
    return min(ms, key=lambda name: ms[name]), ms


def first_sdpa_arguments(runner: Runner, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of the first global attention layer, ``[B, H, N, D]``.

    Args:
        runner: An unpatched model.
        images: A clip, ``[S, 3, H, W]``. The pass stops at that layer.

    Returns:
        Tensors in the precision that autocast gives them.

    Raises:
        FamilyError: If the layer does not call ``F.scaled_dot_product_attention``.
    """
    module, args, kwargs, lowered = runner.first_attention_call(images)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        dtypes = [matmul_dtype(each.dtype, each.device) for each in (query, key, value)]
        query, key, value = (
            each.to(dtype) for each, dtype in zip((query, key, value), dtypes, strict=True)
        )
        seen.append((query, key, value))
        return F.scaled_dot_product_attention(query, key, value, *rest, **options)

    with torch.inference_mode(), autocast(runner.device, lowered), ReplaceSDPA(note):
        module(*args, **kwargs)
    if not seen:
        raise FamilyError(
            f"{type(module).__name__} does not call F.scaled_dot_product_attention, so that no "
            "kernel of it can be chosen: leave the backend to torch (auto)"
        )
    return seen[0]


def _kernel(name: str) -> SDPBackend:
    return getattr(SDPBackend, _KERNELS[name])
