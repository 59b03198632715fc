"""Projection of queries, and of the keys and values of the kept tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import overridden

Project = Callable[[Tensor], Tensor]
"""From hidden states ``[B, n, C]`` to queries ``[B, H, n, D]``, before any norm."""


def project_all(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of all tokens, before any norm.

    They are views of one tensor, the output of a fused ``qkv`` layer.

    Args:
        attn: Module with ``qkv`` (outputs query, key, value in this order) and ``num_heads``.
        x: Hidden states ``[B, N, C]``.

    Returns:
        ``[B, H, N, D]`` each.
    """
    query, key, value = (_split(part, attn) for part in attn.qkv(x).chunk(3, dim=-1))
    return query, key, value


def project_queries(attn: Any, dtype: torch.dtype | None = None) -> Project:
    """Return the projection of queries alone, by a slice of the layer's weight where it has one.

    Args:
        attn: Module as in `project_all`.
        dtype: Precision of the products, in which a sliced weight is cast once; None leaves that to
            each call.
    """
    qkv = attn.qkv
    if not is_plain_linear(qkv):
        # Rows of its weight may depend on one another (quantised, low-rank or masked layers).
        return lambda x: _split(qkv(x).chunk(3, dim=-1)[0], attn)
    width = qkv.weight.shape[0] // 3
    weight, bias = qkv.weight[:width], None if qkv.bias is None else qkv.bias[:width]
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return lambda x: _split(F.linear(x, weight, bias), attn)


def project_kept(attn: Any, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values ``[B, H, M, D]`` of kept hidden states ``[B, M, C]``.

    ``attn`` is that of `project_all`. The projection is pruned where that is exact.
    """
    qkv = attn.qkv
    if is_plain_linear(qkv):
        width = qkv.weight.shape[0] // 3
        bias = None if qkv.bias is None else qkv.bias[width:]
        key, value = F.linear(kept, qkv.weight[width:], bias).chunk(2, dim=-1)
    else:
        key, value = qkv(kept).chunk(3, dim=-1)[1:]
    return _split(key, attn), _split(value, attn)


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


def _split(tokens: Tensor, attn: Any) -> Tensor:
    return tokens.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
