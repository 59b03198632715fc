"""Norm, rotary embedding and cast of queries or keys, in one kernel.

Under autocast the norm of queries leaves them in float32, their rotation is six kernels, and only
attention casts them back. The fused kernel reads them once where the projection left them, computes
in float32, and writes them once, in the precision of attention and with the heads of a token side
by side, as merging reads them. Its result is rounded once, where the plain steps round once each.

The plain implementation is `plain`, `implementation` chooses, and `norm_rope_triton` has the
kernel. It has no gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..compiling import assume_constant_result
from ..rope import Rope, apply_rope
from . import trials

OPERATION = "norm and rotary embedding"
PLAIN, TRITON = "plain", "triton"


@assume_constant_result
def implementation(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return `TRITON` or `PLAIN`.

    The first call with new arguments tries the kernel, outside of any traced region.

    Args:
        device: Device of the tensors.
        dtype: Precision of the result.
        head_dim: Size of one attention head, D.
    """
    possible = device.type == "cuda" and torch.cuda.is_available()
    candidates = (TRITON,) if possible and is_covered_size(head_dim) else ()
    chosen = trials.choose(OPERATION, candidates, PLAIN, _trial, device, dtype, head_dim)
    if chosen == TRITON:
        _register()
    return chosen


def is_possible(device: torch.device) -> bool:
    """Return False if the plain implementation is certain on a device."""
    return trials.is_possible(OPERATION, device)


def is_covered_size(head_dim: int) -> bool:
    """Return True if the kernel runs heads of this size: four times a power of two."""
    quarter, rest = divmod(head_dim, 4)
    return rest == 0 and quarter > 0 and quarter & (quarter - 1) == 0


def apply(
    tokens: Tensor,
    norm: nn.LayerNorm | None,
    rope: Rope | None,
    rows: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return normalised, rotated and cast queries or keys, by the kernel.

    `implementation` must have returned `TRITON` for them.

    Args:
        tokens: ``[B, H, N, D]`` in float32 or half precision, of any strides but the last, which is
            1. D is four times a power of two.
        norm: Layer norm over D; None for none.
        rope: Cosines and sines of R positions, ``[R, D]`` each, as in `spark3r.rope`; None for no
            rotation.
        rows: Row of ``rope`` of each token, ``[N]`` int64; None takes row n mod R.
        dtype: Precision of the result.

    Returns:
        ``[B, H, N, D]``, in memory ``[B, N, H, D]``.
    """
    operators: Any = torch.ops.spark3r
    weight, bias, eps = (None, None, -1.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    cos, sin = (None, None) if rope is None else rope
    return operators.norm_rope(tokens, weight, bias, eps, cos, sin, rows, dtype)


def plain(
    tokens: Tensor,
    norm: nn.LayerNorm | None,
    rope: Rope | None,
    rows: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return what `apply` returns, step by step and in any precision."""
    if norm is not None:
        tokens = norm(tokens)
    if rope is not None:
        count, positions = tokens.shape[2], rope[0].shape[0]
        chosen = torch.arange(count, device=tokens.device) % positions if rows is None else rows
        tokens = apply_rope(tokens, (rope[0][chosen], rope[1][chosen]))
    return tokens.to(dtype)


@lru_cache(maxsize=1)
def _register() -> torch.library.Library:
    """Define the operator ``spark3r::norm_rope`` once, so that a compiled graph can hold it."""
    from .norm_rope_triton import launch

    library = torch.library.Library("spark3r", "FRAGMENT")
    library.define(
        "norm_rope(Tensor tokens, Tensor? weight, Tensor? bias, float eps, Tensor? cos, "
        "Tensor? sin, Tensor? rows, ScalarType dtype) -> Tensor"
    )
    library.impl("norm_rope", launch, "CUDA")
    library.impl("norm_rope", launch, "CPU")  # under Triton's interpreter
    library.impl("norm_rope", _shape, "Meta")
    return library


def _shape(tokens: Tensor, *_: Any) -> Tensor:
    batch, heads, length, dim = tokens.shape
    return tokens.new_empty((batch, length, heads, dim), dtype=_[-1]).transpose(1, 2)


def _trial(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Compare the kernel with the plain steps in float64, on odd lengths and a pass's strides."""
    _register()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for length, positions, own, indexed in ((67, 19, dtype, False), (35, 19, torch.float32, True)):
        heads = random(2, length, 3, 2, head_dim).to(dtype)
        tokens = heads[:, :, 1].transpose(1, 2) + 3  # with a mean to remove
        norm = nn.LayerNorm(head_dim)
        norm.weight.copy_(1 + 0.3 * random(head_dim))
        norm.bias.copy_(random(head_dim))
        norm = norm.to(own)
        angle = random(positions, 2, 1, head_dim // 4).expand(-1, -1, 2, -1).flatten(1)
        rope = (angle.cos().to(own), angle.sin().to(own))
        rows = torch.randint(positions, (length,), generator=generator) if indexed else None
        exact = plain(
            tokens.double(),
            norm.double(),
            (rope[0].double(), rope[1].double()),
            rows,
            torch.float64,
        )
        found = apply(
            tokens.to(device),
            norm.to(device, own),
            (rope[0].to(device), rope[1].to(device)),
            None if rows is None else rows.to(device),
            dtype,
        )
        reason = trials.disagreement(found, exact, torch.finfo(dtype).eps)
        if reason is not None:
            return reason
    return None
