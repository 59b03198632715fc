"""Attention to keys of few distinct biases, without a mask.

Mass correction adds a bias to the logits of some keys. Flash attention takes no mask, and kernels
that take one are several times slower. But there are only a few distinct biases. So the keys are
ordered by bias, every group of one bias is attended to by a call of a fused kernel that also
returns its log-sum-exp, and the outputs are joined by their log-sum-exps in float32. This is exact
up to rounding. The kernels' private operators have no gradient through the log-sum-exp, so the mask
stays where gradients are recorded.

The plain implementation is `masked`, and `implementation` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda

from ..compiling import assume_constant_result
from . import trials

OPERATION = "attention with mass correction"
MASK = "mask"

MOST_QUERIES = 2**19
"""Queries that are joined at once. Their outputs take 4 bytes a number instead of 2 meanwhile."""

MOST_MASKED = 2**31
"""Queries times keys of one call with a mask on CUDA. The memory-efficient kernel reads wrong rows
of the mask from 2³² on (https://github.com/pytorch/pytorch/issues/187227)."""

Group = tuple[int, int, float]
"""First key, number of keys, and bias of their logits."""


@assume_constant_result
def implementation(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the kernel that attends group by group, or `MASK`.

    The first call with new arguments tries the kernels, outside of any traced region.

    Args:
        device: Device of the tensors.
        dtype: Precision of queries, keys and values.
        head_dim: Size of one attention head, D.
    """
    return trials.choose(OPERATION, _candidates(device), MASK, _trial, device, dtype, head_dim)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[Group],
    kernel: str,
    scale: float | None = None,
) -> Tensor:
    """Return attention, computed by a fused kernel one group of keys at a time.

    Args:
        query: Queries ``[B, H, N, D]``.
        key: Keys ``[B, H, M, D]`` in the queries' precision, ordered by group.
        value: Values ``[B, H, M, D]``, likewise.
        groups: The groups, which cover the keys in their order.
        kernel: ``flash``, ``cudnn`` or ``efficient``.
        scale: Factor on the logits; None takes 1/sqrt(D).

    Returns:
        ``[B, H, N, D]`` in the queries' precision, without gradient.
    """
    length = query.shape[2]
    pieces = -(-length // MOST_QUERIES)
    if pieces == 1:
        return _joined(query, key, value, groups, kernel, scale)
    output = value.new_empty((*query.shape[:3], value.shape[3]))
    ends = [length * (i + 1) // pieces for i in range(pieces)]
    for start, end in zip((0, *ends[:-1]), ends, strict=True):
        part = query[:, :, start:end]
        output[:, :, start:end] = _joined(part, key, value, groups, kernel, scale)
    return output


def masked(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None = None
) -> Tensor:
    """Return attention with a bias ``[M]`` on the logits of the keys, by a mask.

    Tensors are those of `attend`, and gradients flow.
    """
    mask = bias.view(1, 1, 1, -1)  # broadcast over queries, never written out
    rows = masked_rows(query.device, query.shape[2], key.shape[2])
    if rows == query.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    parts = [
        F.scaled_dot_product_attention(part, key, value, attn_mask=mask, scale=scale)
        for part in query.split(rows, dim=2)
    ]
    return torch.cat(parts, dim=2)


def masked_rows(device: torch.device, queries: int, keys: int) -> int:
    """Return how many queries one call with a mask may have."""
    return min(queries, max(1, MOST_MASKED // keys)) if device.type == "cuda" else queries


def _joined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[Group],
    kernel: str,
    scale: float | None,
) -> Tensor:
    run = _KERNELS[kernel]

    def group(start: int, count: int, bias: float) -> tuple[Tensor, Tensor]:
        own = key.narrow(2, start, count), value.narrow(2, start, count)
        output, mass = run(query, *own, scale)
        return output.float(), mass.float() + bias if bias else mass.float()

    joined, total = group(*groups[0])
    for i, each in enumerate(groups[1:], start=2):
        output, mass = group(*each)
        joined = joined.lerp_(output, torch.sigmoid(mass - total).unsqueeze(-1))
        if i < len(groups):
            total = torch.logaddexp(total, mass)
    return joined.to(query.dtype)


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    aten: Any = torch.ops.aten
    if query.device.type == "cpu":
        found = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    else:
        found = aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    return found[0], found[1]


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    aten: Any = torch.ops.aten
    found = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)
    return found[0], found[1].reshape(query.shape[:3])


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    aten: Any = torch.ops.aten
    found = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)
    return found[0], found[1][:, :, : query.shape[2]]  # padded to a multiple of 32


_KERNELS = {"flash": _flash, "cudnn": _cudnn, "efficient": _efficient}


def _candidates(device: torch.device) -> tuple[str, ...]:
    """Return the kernels that `torch.nn.attention.sdpa_kernel` allows, the fastest first."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ()
    # cuDNN's kernels are the faster ones from Hopper on.
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    order = ("cudnn", "flash", "efficient") if hopper else ("flash", "cudnn", "efficient")
    enabled = {
        "flash": cuda.flash_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled() if hasattr(cuda, "cudnn_sdp_enabled") else False,
        "efficient": cuda.mem_efficient_sdp_enabled(),
    }
    return tuple(name for name in order if enabled[name])


def _trial(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Compare a kernel with the mask in float64, on odd lengths and the strides of a pass."""
    generator = torch.Generator().manual_seed(0)
    sizes = (37, 5, 101)
    query, key, value = (
        torch.randn(2, length, 3, head_dim, generator=generator).to(dtype).transpose(1, 2)
        for length in (131, sum(sizes), sum(sizes))
    )
    # The share of each group depends on head, query and bias, and shows in the output.
    query *= torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1)
    groups, start = [], 0
    for size, bias, spread in zip(sizes, (0.0, 1.5, 3.0), (1.0, 0.5, 0.2), strict=True):
        key[:, :, start : start + size] *= spread
        value[:, :, start : start + size] += 2 * bias
        groups.append((start, size, bias))
        start += size
    mask = torch.cat([torch.full((count,), each).double() for _, count, each in groups])
    exact = masked(query.double(), key.double(), value.double(), mask)
    found = attend(query.to(device), key.to(device), value.to(device), groups, kernel)
    return trials.disagreement(found, exact, torch.finfo(dtype).eps)
