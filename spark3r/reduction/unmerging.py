"""Linear unmerging: tokens of a merged query get back what sets them apart from it.

Attention is smooth in the query, so that near a merged query q̄ its output is about
o(q̄) + (q - q̄)·J. J is not derived but read off what was computed anyway: destinations are compared
with the most similar ones of their group, and one matrix for all heads side by side is fitted to
the differences of their outputs by ridge regression. A merged query is the mean of its tokens, so
that their outputs keep the mean that copying would give each of them. No query is attended twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import merging
from .merging import MergePlan, features, nearest, precisely

COMPARED_PER_FEATURE = 4
"""Destinations compared, in multiples of the H·D numbers of a query."""

PARTNERS = 2
"""Destinations that each is compared with."""

RIDGE = 0.1
"""Ridge of the regression, as a share of what the squared differences sum to, mean over features
(docs/method/queries.md)."""


def unmerge(
    query: Tensor, merged: Tensor, output: Tensor, places: Tensor, plan: MergePlan
) -> Tensor:
    """Return the full sequence of outputs, each token's moved from its place's by a linear map.

    Args:
        query: ``[B, H, N, D]`` as it was before merging.
        merged: Merged queries, ``[B, H, K, D]``.
        output: What attention gave for them, ``[B, H, K, D]``.
        places: From `merge.match`, ``[B, N]``.
        plan: The merge plan.

    Returns:
        ``[B, H, N, D]`` in the output's dtype. Tokens that were merged with none keep what
        attention gave for them.
    """
    dtype = output.dtype  # that of the queries may be another under autocast
    limit = torch.finfo(dtype).max
    slope = fit(merged, output, plan).clamp(-limit, limit).to(dtype)
    # In place, since these tensors are as long as the clip and nobody else has them.
    apart = merging.unmerge(merged, places).sub_(query).to(dtype)  # zero where nothing was merged
    moved = _side_by_side(merging.unmerge(output, places))
    moved.baddbmm_(_side_by_side(apart), slope, alpha=-1)
    return moved.unflatten(2, (output.shape[1], output.shape[3])).transpose(1, 2)


def fit(merged: Tensor, output: Tensor, plan: MergePlan) -> Tensor:
    """Return by what matrix the outputs of similar destinations differ when their queries do.

    Args:
        merged: Merged queries, ``[B, H, K, D]``.
        output: What attention gave for them, ``[B, H, K, D]``.
        plan: The merge plan they come from.

    Returns:
        ``[B, H·D, H·D]`` in float32 or, for float64 queries, in float64.
    """
    with precisely(merged.device):
        dtype = torch.promote_types(merged.dtype, torch.float32)
        one, other = _pairs(merged, plan)
        apart = _differences(merged, one, other, dtype)
        output_apart = _differences(output, one, other, dtype)
        # Queries that differ by their rounding alone say nothing.
        size = merged.to(dtype).square().mean(dim=(1, 2, 3))
        rounding = torch.finfo(merged.dtype).eps ** 2 * size
        return regress(apart, output_apart, one.shape[1] * rounding)


def regress(apart: Tensor, output_apart: Tensor, least: Tensor) -> Tensor:
    """Return the least squares solution of ``apart @ slope = output_apart`` with a ridge.

    Args:
        apart: ``[B, R, C]``.
        output_apart: ``[B, R, E]``.
        least: What the ridge is at least, ``[B]``.

    Returns:
        ``[B, C, E]``; zero where nothing is apart, or where rounding leaves no solution.
    """
    square = apart.transpose(1, 2) @ apart
    diagonal = square.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.mean(dim=1) + least
    # No differences of queries that are all zero would divide zero by zero.
    ridge = (ridge + torch.finfo(ridge.dtype).tiny ** 0.5).unsqueeze(1)
    # What failed is not raised: that would wait for the device.
    factor, failed = torch.linalg.cholesky_ex(square + torch.diag_embed(ridge.expand_as(diagonal)))
    slope = torch.cholesky_solve(apart.transpose(1, 2) @ output_apart, factor)
    return slope.masked_fill(failed.ne(0).view(-1, 1, 1), 0.0)


def _pairs(merged: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Return the places of destinations that are compared, ``[B, R]`` each."""
    device = merged.device
    compared = features(merged)
    share = (
        COMPARED_PER_FEATURE
        * merged.shape[1]
        * merged.shape[3]
        / sum(block.groups * block.destinations for block in plan.blocks)
    )
    one, other = [], []
    for block in plan.blocks:
        n, d = block.groups, block.destinations
        count = min(d, math.ceil(d * share))
        chosen = torch.arange(count, device=device) * d // count  # evenly over the group
        group = compared.narrow(1, block.first_destination, n * d).unflatten(1, (n, d))
        # The most similar one is itself, or a twin: neither says anything.
        found = nearest(group.index_select(2, chosen), group, min(d, 1 + PARTNERS))[..., 1:]
        first = block.first_destination + d * torch.arange(n, device=device).view(n, 1, 1)
        other.append((first + found).flatten(1))
        one.append((first + chosen.view(1, -1, 1)).expand_as(found).flatten(1))
    return torch.cat(one, dim=1), torch.cat(other, dim=1)


def _differences(merged: Tensor, one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``[B, H, K, D]`` at places ``other`` less that at ``one``, as ``[B, R, H·D]``."""
    taken = (_side_by_side(merging.unmerge(merged, places)).to(dtype) for places in (other, one))
    return torch.sub(*taken)


def _side_by_side(heads: Tensor) -> Tensor:
    """Return ``[B, H, N, D]`` as ``[B, N, H·D]``."""
    return heads.transpose(1, 2).flatten(2)
