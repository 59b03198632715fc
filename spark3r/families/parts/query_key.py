"""Norm, rotary embedding and precision of queries and keys, by the fused kernel where there is one.

Queries and keys leave in the precision of the values. Under autocast a norm leaves them in float32,
and attention would cast them in any case; cast before it, merging and unmerging move half as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import norm_rope
from ...layout import TokenLayout
from ...reduction.pruning import KeySelection
from ...rope import Rope
from .projection import is_unhooked
from .rotary import frame_tables, rotate

Where = slice | KeySelection | None
"""Which tokens of the sequence: those of whole frames, the kept ones, or all."""


def normalise_and_rotate(
    attn: Any,
    layout: TokenLayout,
    norm: nn.Module | None,
    make: Callable[[], Tensor],
    where: Where,
    dtype: torch.dtype,
    *,
    rotary: bool,
    uniform: bool = False,
    cast_first: bool = False,
) -> Tensor:
    """Return queries or keys as attention takes them.

    Args:
        attn: Module with ``q_norm`` and ``k_norm`` (None for none), and ``rope``.
        layout: Token layout of the sequence.
        norm: The one of both norms that belongs to the tokens.
        make: Function that projects them, ``[B, H, n, D]``. Nothing else may hold its result, so
            that it is freed as soon as it is normalised.
        where: Which tokens they are.
        dtype: Precision of the result, that of the values.
        rotary: Whether ``attn.rope`` rotates them.
        uniform: Whether all patches have the same position; see `rotary.rotate`.
        cast_first: Whether the model casts before it rotates, and not after it.
    """
    tokens = make()
    rows = rows_in_frame(where, layout)
    if is_fused(attn, tokens, dtype):
        rope = None
        if rotary:
            turned_in = dtype if cast_first else _norm_dtype(tokens)
            rope = frame_tables(tokens, attn.rope, layout, turned_in, uniform=uniform)
        return fused(norm, tokens, dtype, rope, rows)
    if norm is not None:
        tokens = norm(tokens)
    if cast_first:
        tokens = tokens.to(dtype)
    if rotary:
        tokens = rotate(tokens, attn.rope, layout, rows, uniform=uniform)
    return tokens.to(dtype)


def rows_in_frame(where: Where, layout: TokenLayout) -> Tensor | None:
    """Return the place of each token inside its frame, ``[n]``; None if they are whole frames."""
    if isinstance(where, KeySelection) and where.index is not None:
        return where.index % layout.tokens_per_frame
    return None


def is_fused(attn: Any, query: Tensor, dtype: torch.dtype) -> bool:
    """Return True if the fused kernel covers a module's norms, and runs where the queries are.

    Args:
        attn: Module with ``q_norm`` and ``k_norm``.
        query: Projected queries or keys ``[B, H, n, D]``.
        dtype: Precision of the result.
    """
    if not norm_rope.is_possible(query.device) or torch.is_grad_enabled():
        return False
    head_dim = query.shape[-1]
    covered = all(_is_covered(norm, head_dim) for norm in (attn.q_norm, attn.k_norm))
    return covered and (norm_rope.implementation(query.device, dtype, head_dim) == norm_rope.TRITON)


def fused(
    norm: nn.Module | None,
    tokens: Tensor,
    dtype: torch.dtype,
    rope: Rope | None,
    rows: Tensor | None,
) -> Tensor:
    """Return queries or keys by the fused kernel; `is_fused` must hold.

    Args:
        norm: Their norm.
        tokens: Projected queries or keys ``[B, H, n, D]``.
        dtype: Precision of the result.
        rope: Tables of their positions; None for no rotation.
        rows: Rows of the tokens in the tables, ``[n]``; None if the tables repeat along them.
    """
    layer_norm = norm if isinstance(norm, nn.LayerNorm) else None
    return norm_rope.apply(tokens, layer_norm, rope, None if rope is None else rows, dtype)


def _is_covered(norm: nn.Module | None, head_dim: int) -> bool:
    if norm is None or type(norm) is nn.Identity:
        return True
    if type(norm) is not nn.LayerNorm or not is_unhooked(norm):
        return False
    return norm.normalized_shape == (head_dim,)


def _norm_dtype(query: Tensor) -> torch.dtype:
    """Return the precision that a layer norm leaves queries in: float32 under CUDA's autocast."""
    lowered = (
        torch.is_autocast_enabled(query.device.type)
        if _AUTOCAST_BY_DEVICE
        else torch.is_autocast_enabled()
    )
    return torch.float32 if lowered else query.dtype


_AUTOCAST_BY_DEVICE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 4)
