"""Norm, rotary embedding and precision of queries and keys, by the fused kernel where there is one.

Queries and keys leave in the precision of the values. Under autocast a norm leaves them in float32,
and attention would cast them in any case; cast before it, merging and unmerging move half as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import norm_rope
from ...layout import TokenLayout
from ...reduction.pruning import KeySelection
from ...rope import Rope
from .projection import is_unhooked
from .rotary import frame_tables, rotate


def normalise_and_rotate(
    attn: Any,
    query: Tensor,
    key: Tensor,
    dtype: torch.dtype,
    layout: TokenLayout,
    selection: KeySelection | None,
    *,
    rotary: bool,
    uniform: bool = False,
    cast_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return queries and keys as attention takes them.

    Args:
        attn: Module with ``q_norm`` and ``k_norm`` (None for none), and ``rope``.
        query: Projected queries ``[B, H, N, D]``.
        key: Projected keys of the selected tokens ``[B, H, M, D]``.
        dtype: Precision of the result, that of the values.
        layout: Token layout of the N tokens.
        selection: Selection of the tokens that have keys, None for all.
        rotary: Whether ``attn.rope`` rotates them.
        uniform: Whether all patches have the same position; see `rotary.rotate`.
        cast_first: Whether the model casts before it rotates, and not after it.
    """
    if is_fused(attn, query, dtype):
        rope, rows = None, None
        if rotary:
            turned_in = dtype if cast_first else _norm_dtype(query)
            rope = frame_tables(query, attn.rope, layout, turned_in, uniform=uniform)
            if selection is not None and selection.index is not None:
                rows = selection.index % layout.tokens_per_frame
        return fused(attn, query, key, dtype, rope, rope, rows)
    if attn.q_norm is not None:
        query, key = attn.q_norm(query), attn.k_norm(key)
    if cast_first:
        query, key = query.to(dtype), key.to(dtype)
    if rotary:
        query, key = rotate(query, key, attn.rope, layout, selection, uniform=uniform)
    return query.to(dtype), key.to(dtype)


def is_fused(attn: Any, query: Tensor, dtype: torch.dtype) -> bool:
    """Return True if the fused kernel covers a module's norms, and runs where the queries are.

    Args:
        attn: Module with ``q_norm`` and ``k_norm``.
        query: Projected queries ``[B, H, N, D]``.
        dtype: Precision of the result.
    """
    if not norm_rope.is_possible(query.device) or torch.is_grad_enabled():
        return False
    head_dim = query.shape[-1]
    covered = all(_is_covered(norm, head_dim) for norm in (attn.q_norm, attn.k_norm))
    return covered and (norm_rope.implementation(query.device, dtype, head_dim) == norm_rope.TRITON)


def fused(
    attn: Any,
    query: Tensor,
    key: Tensor,
    dtype: torch.dtype,
    rope: Rope | None,
    key_rope: Rope | None,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return queries and keys by the fused kernel; `is_fused` must hold.

    Args:
        attn: Module with ``q_norm`` and ``k_norm``.
        query: Projected queries ``[B, H, N, D]``.
        key: Projected keys ``[B, H, M, D]``.
        dtype: Precision of the result.
        rope: Tables of the queries, which repeat along them; None for no rotation.
        key_rope: Tables of the keys.
        rows: Rows of the keys in their tables, ``[M]``; None if the tables repeat along them.
    """
    return (
        norm_rope.apply(query, _norm(attn.q_norm), rope, None, dtype),
        norm_rope.apply(key, _norm(attn.k_norm), key_rope, rows, dtype),
    )


def _is_covered(norm: nn.Module | None, head_dim: int) -> bool:
    if norm is None or type(norm) is nn.Identity:
        return True
    if type(norm) is not nn.LayerNorm or not is_unhooked(norm):
        return False
    return norm.normalized_shape == (head_dim,)


def _norm(norm: nn.Module | None) -> nn.LayerNorm | None:
    return norm if isinstance(norm, nn.LayerNorm) else None


def _norm_dtype(query: Tensor) -> torch.dtype:
    """Return the precision that a layer norm leaves queries in: float32 under CUDA's autocast."""
    lowered = (
        torch.is_autocast_enabled(query.device.type)
        if _AUTOCAST_BY_DEVICE
        else torch.is_autocast_enabled()
    )
    return torch.float32 if lowered else query.dtype


_AUTOCAST_BY_DEVICE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 4)
