"""Projection of the queries of all tokens, and of the keys and values of the kept ones."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...reduction.pruning import KeySelection
from ..base import overridden


def project(attn: Any, x: Tensor, selection: KeySelection | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the projections of a fused ``qkv`` layer, pruned before it where that is exact.

    Args:
        attn: Module with ``qkv`` (outputs query, key, value in this order) and ``num_heads``.
        x: Hidden states ``[B, N, C]``.
        selection: Selection of the tokens that keep their keys and values, None for all.

    Returns:
        Query ``[B, H, N, D]``, key and value ``[B, H, M, D]``, before any norm.
    """
    qkv, heads = attn.qkv, attn.num_heads
    if selection is None:
        query, key, value = qkv(x).chunk(3, dim=-1)
    elif is_plain_linear(qkv):
        width = qkv.weight.shape[0] // 3
        bias = (None, None) if qkv.bias is None else (qkv.bias[:width], qkv.bias[width:])
        query = F.linear(x, qkv.weight[:width], bias[0])
        key, value = F.linear(selection.take(x), qkv.weight[width:], bias[1]).chunk(2, dim=-1)
    else:
        # Rows of its weight may depend on one another (quantised, low-rank or masked layers).
        query = qkv(x).chunk(3, dim=-1)[0]
        key, value = qkv(selection.take(x)).chunk(3, dim=-1)[1:]
    return _split(query, heads), _split(key, heads), _split(value, heads)


def is_plain_linear(module: nn.Module) -> bool:
    """Return True if a module is a linear layer without hooks, whose weight may be sliced."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return False  # quantised and sharded weights exist inside plain layers, too
    return is_unhooked(module)


def is_unhooked(module: nn.Module) -> bool:
    """Return True if a module runs the forward of its class and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or overridden(module)
    )


def join(output: Tensor) -> Tensor:
    """Return attention output ``[B, H, N, D]`` as hidden states ``[B, N, H * D]``."""
    return output.transpose(1, 2).flatten(2)


def _split(tokens: Tensor, heads: int) -> Tensor:
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)
