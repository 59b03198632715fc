"""Linear unmerging: the tokens of one merged query get outputs that differ again.

Attention is smooth in the query. Near a merged query q̄ its output is about o(q̄) + (q - q̄)·J. The
matrix J is fitted to results that the pass already has: destinations are compared with the most
similar ones of their group, and ridge regression fits one matrix, for all heads side by side, to
the differences of their outputs. A merged query is the mean of its tokens, so the mean of their
outputs is the output that copying would give each of them. No further query attends.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import merging
from .merging import MergePlan, Pool, head_mean, nearest, precisely


def move_by_map(
    query: Tensor, merged: Tensor, output: Tensor, places: Tensor, slope: Tensor
) -> Tensor:
    """Return the outputs of all tokens: the output of each token's place, moved by a linear map.

    Args:
        query: Queries before merging, ``[B, H, N, D]``.
        merged: Merged queries, ``[B, H, K, D]``.
        output: Attention output of the merged queries, ``[B, H, K, D]``.
        places: Places from `merging.match`, ``[B, N]``.
        slope: Linear map from `fit`, ``[B, H·D, H·D]``.

    Returns:
        ``[B, H, N, D]`` in the output's dtype. A token that was merged with no other keeps its
        attention output.
    """
    dtype = output.dtype  # under autocast the queries may have another one
    limit = torch.finfo(dtype).max
    slope = slope.clamp(-limit, limit).to(dtype)
    # In place, because these tensors are as long as the clip and nothing else holds them.
    apart = merging.copy_back(merged, places).sub_(query).to(dtype)  # zero where nothing was merged
    moved = _side_by_side(merging.copy_back(output, places))
    moved.baddbmm_(_side_by_side(apart), slope, alpha=-1)
    return moved.unflatten(2, (output.shape[1], output.shape[3])).transpose(1, 2)


def fit(
    merged: Tensor,
    output: Tensor,
    one: Tensor,
    other: Tensor,
    ridge: float,
    pool: Pool | None = None,
) -> Tensor:
    """Return the matrix by which outputs of similar destinations differ when their queries do.

    Args:
        merged: Merged queries, ``[B, H, K, D]``.
        output: Attention output of the merged queries, ``[B, H, K, D]``.
        one: First places of the pairs to compare, ``[B, R]`` int64, from `similar_pairs`.
        other: Second places of the pairs, ``[B, R]`` int64.
        ridge: Ridge of the regression, as in `regress`.
        pool: The part of the other ranks, if several share the clip.

    Returns:
        ``[B, H·D, H·D]`` in float32 or, for float64 queries, in float64.
    """
    with precisely(merged.device):
        dtype = torch.promote_types(merged.dtype, torch.float32)
        apart = _differences(merged, one, other, dtype)
        output_apart = _differences(output, one, other, dtype)
        # Differences that come from rounding alone carry no information.
        size = merged.to(dtype).square().mean(dim=(1, 2, 3))
        rounding = torch.finfo(merged.dtype).eps ** 2 * size
        return regress(apart, output_apart, one.shape[1] * rounding, ridge, pool)


def similar_pairs(
    merged: Tensor, plan: MergePlan, compared_per_feature: int, partners: int
) -> tuple[Tensor, Tensor]:
    """Return the places of similar destinations that the fit compares, ``[B, R]`` int64 each.

    Args:
        merged: Merged queries, ``[B, H, K, D]``.
        plan: Merge plan that they come from.
        compared_per_feature: Destinations compared, in multiples of the H·D numbers of a query.
        partners: Number of destinations that each is compared with.
    """
    device = merged.device
    one, other = [], []
    with precisely(device):
        compared = head_mean(merged)
        # The plan has no property for this, because torch.compile cannot read those of a frozen
        # dataclass.
        destinations = sum(block.groups * block.destinations for block in plan.blocks)
        if plan.pool is not None:
            destinations = plan.pool.destinations
        share = compared_per_feature * merged.shape[1] * merged.shape[3] / destinations
        for block in plan.blocks:
            n, d = block.groups, block.destinations
            count = min(d, math.ceil(d * share))
            chosen = torch.arange(count, device=device) * d // count  # evenly over the group
            group = compared.narrow(1, block.first_destination, n * d).unflatten(1, (n, d))
            # The most similar one is the destination itself or an equal one: it is left out.
            found = nearest(group.index_select(2, chosen), group, min(d, 1 + partners))[..., 1:]
            first = block.first_destination + d * torch.arange(n, device=device).view(n, 1, 1)
            other.append((first + found).flatten(1))
            one.append((first + chosen.view(1, -1, 1)).expand_as(found).flatten(1))
        return torch.cat(one, dim=1), torch.cat(other, dim=1)


def regress(
    apart: Tensor, output_apart: Tensor, least: Tensor, ridge: float, pool: Pool | None = None
) -> Tensor:
    """Return the least squares solution of ``apart @ slope = output_apart`` with a ridge.

    Args:
        apart: Differences of queries, ``[B, R, C]``.
        output_apart: Differences of outputs, ``[B, R, E]``.
        least: Lower bound of the ridge, ``[B]``.
        ridge: Ridge as a share of the mean over features of the summed squared differences.
        pool: Sums over the differences of all ranks, if several share the clip.

    Returns:
        ``[B, C, E]``. It is zero where no queries differ, or where rounding leaves no solution.
    """
    square, product = (apart.transpose(1, 2) @ each for each in (apart, output_apart))
    if pool is not None:
        square, product, least = pool.sum(square, product, least)
    diagonal = square.diagonal(dim1=1, dim2=2)
    added = ridge * diagonal.mean(dim=1) + least
    # Without this term, queries that do not differ at all would divide zero by zero.
    added = (added + torch.finfo(added.dtype).tiny ** 0.5).unsqueeze(1)
    # A failure is not raised, because that would wait for the device.
    factor, failed = torch.linalg.cholesky_ex(square + torch.diag_embed(added.expand_as(diagonal)))
    slope = torch.cholesky_solve(product, factor)
    return slope.masked_fill(failed.ne(0).view(-1, 1, 1), 0.0)


def _differences(merged: Tensor, one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``[B, H, K, D]`` at places ``other`` minus that at ``one``, as ``[B, R, H·D]``."""
    taken = (_side_by_side(merging.copy_back(merged, places)).to(dtype) for places in (other, one))
    return torch.sub(*taken)


def _side_by_side(heads: Tensor) -> Tensor:
    """Return ``[B, H, N, D]`` as ``[B, N, H·D]``."""
    return heads.transpose(1, 2).flatten(2)
