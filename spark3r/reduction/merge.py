"""Query merging inside groups of consecutive frames (Spark3R §IV-B), and its undoing.

One query patch in r is a destination (see `lattice`); every other patch, a source, joins the most
similar destination of its group by cosine over all heads together, ties to the first. A
destination becomes the mean of itself and its sources; after attention each source copies its
destination's output. Special tokens, tail tokens and, on request, the anchor frame stand aside.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import TokenLayout
from ..schedule import LayerRule
from .lattice import residues

SIMILARITY_ELEMENTS = 2**22
"""Similarities held at once: 16 MiB in float32, or one source's row where that is longer."""


@dataclass(frozen=True)
class GroupBlock:
    """Consecutive groups that split into destinations and sources alike.

    Attributes:
        groups: Number of groups n.
        destinations: Destinations per group d.
        sources: Sources per group s.
        first_destination: Where the block's destinations start in the merged sequence.
        first_source: Where its sources start in the list of sources.
    """

    groups: int
    destinations: int
    sources: int
    first_destination: int
    first_source: int


@dataclass(frozen=True, eq=False)
class MergePlan:
    """What of query merging depends on the layout alone.

    Attributes:
        kept: Positions of the merged sequence's tokens in the full one, ``[K]``: first those that
            stand aside, then the destinations group by group.
        sources: Positions of the sources in the full sequence, ``[M]``, group by group.
        restore: For each of the N tokens its place in kept followed by sources, ``[N]``.
        blocks: Runs of alike groups.
    """

    kept: Tensor
    sources: Tensor
    restore: Tensor
    blocks: tuple[GroupBlock, ...]


def plan(layout: TokenLayout, rule: LayerRule, device: torch.device) -> MergePlan | None:
    """Return the merge plan of a resolved rule, cached, or None when no query is merged."""
    if rule.query == 1:
        return None
    operators = rule.operators
    assert operators is not None, "resolve the schedule first"
    factor, group = index(rule.query), index(operators.group)
    found = _plan(layout.fields, factor, group, operators.merge_anchor, device)
    return found if found.blocks else None  # only the anchor frame, and it stands aside


def query_length(layout: TokenLayout, rule: LayerRule) -> int:
    """Return the realised number of queries under a resolved rule."""
    merge_plan = plan(layout, rule, torch.device("cpu"))
    return layout.tokens if merge_plan is None else merge_plan.kept.shape[0]


def match(query: Tensor, plan: MergePlan) -> Tensor:
    """Return the most similar destination of every source.

    Args:
        query: ``[B, H, N, D]`` after query norm and rotary embedding.
        plan: From `plan`, on the same device.

    Returns:
        Places in the merged sequence, ``[B, M]`` int64. No gradient flows through it.
    """
    query = query.detach()
    autocast_off = (
        nullcontext()
        if query.device.type == "meta"
        else torch.autocast(query.device.type, enabled=False)
    )
    places = []
    with autocast_off:
        for block in plan.blocks:
            n, d, s = block.groups, block.destinations, block.sources
            kept = plan.kept[block.first_destination : block.first_destination + n * d]
            sources = plan.sources[block.first_source : block.first_source + n * s]
            destination = F.normalize(_features(query, kept).unflatten(1, (n, d)), dim=-1)
            source = _features(query, sources).unflatten(1, (n, s))
            best = _most_similar(source, destination)  # [B, n, s]
            first = block.first_destination + d * torch.arange(n, device=query.device)
            places.append((best + first.view(1, n, 1)).flatten(1))
    return torch.cat(places, dim=1)


def merge(query: Tensor, plan: MergePlan, places: Tensor) -> Tensor:
    """Return the merged queries ``[B, H, K, D]``: means over each destination and its sources.

    Sums accumulate in float32 or, for float64 queries, in float64. On CUDA they are
    deterministic to the last bit under ``torch.use_deterministic_algorithms(True)``.
    """
    batch, heads, _, dim = query.shape
    length = plan.kept.shape[0]
    exact = torch.promote_types(query.dtype, torch.float32)
    total = _take_rows(query, plan.kept.expand(batch, -1)).to(exact)
    added = _take_rows(query, plan.sources.expand(batch, -1)).to(exact)
    rows = _row_index(places, heads, length)
    total = total.flatten(0, 2).scatter_add(
        0, rows.view(-1, 1).expand(-1, dim), added.flatten(0, 2)
    )
    ones = torch.ones(1, dtype=exact, device=query.device)
    count = ones.expand(batch, length).scatter_add(1, places, ones.expand_as(places))
    mean = total.view(batch, heads, length, dim) / count.view(batch, 1, length, 1)
    return mean.to(query.dtype)


def unmerge(output: Tensor, plan: MergePlan, places: Tensor) -> Tensor:
    """Return the full sequence ``[B, H, N, D]`` from ``[B, H, K, D]``: sources copy."""
    own = torch.arange(plan.kept.shape[0], device=places.device).expand(places.shape[0], -1)
    origin = torch.cat((own, places), dim=1).index_select(1, plan.restore)  # [B, N]
    return _take_rows(output, origin)


def _features(query: Tensor, tokens: Tensor) -> Tensor:
    """Return what is compared, all heads concatenated: ``[B, len(tokens), H * D]`` in >= fp32."""
    chosen = query.index_select(2, tokens).transpose(1, 2).flatten(2)
    return chosen.to(torch.promote_types(query.dtype, torch.float32))


def _most_similar(source: Tensor, destination: Tensor) -> Tensor:
    """Return arg-max over destinations, ``[B, n, s]``, never holding more than the stated chunk."""
    batch, n, s, d = *source.shape[:3], destination.shape[2]
    groups = SIMILARITY_ELEMENTS // (batch * s * d) if s else n
    if groups:
        return torch.cat(
            [
                torch.matmul(
                    source[:, i : i + groups], destination[:, i : i + groups].transpose(2, 3)
                ).argmax(dim=-1)
                for i in range(0, n, groups)
            ],
            dim=1,
        )
    rows = max(1, SIMILARITY_ELEMENTS // (batch * d))
    return torch.stack(
        [
            torch.cat(
                [
                    torch.matmul(
                        source[:, i, j : j + rows], destination[:, i].transpose(1, 2)
                    ).argmax(dim=-1)
                    for j in range(0, s, rows)
                ],
                dim=1,
            )
            for i in range(n)
        ],
        dim=1,
    )


def _row_index(places: Tensor, heads: int, length: int) -> Tensor:
    """Return ``[B, L]`` token indices as row numbers of a ``[B * H * length, D]`` matrix."""
    batch = places.shape[0]
    offset = length * torch.arange(batch * heads, device=places.device).view(batch, heads, 1)
    return (places.unsqueeze(1) + offset).flatten()


def _take_rows(tokens: Tensor, places: Tensor) -> Tensor:
    """Return ``[B, H, L, D]``, tokens ``[B, H, N, D]`` at ``[B, L]``: whole rows, one call."""
    batch, heads, length, dim = tokens.shape
    rows = _row_index(places, heads, length)
    return tokens.reshape(-1, dim).index_select(0, rows).view(batch, heads, -1, dim)


@torch.compiler.assume_constant_result
def _plan(
    layout: tuple[Any, ...], factor: int, group: int, merge_anchor: bool, device: torch.device
) -> MergePlan:
    return _build(layout, factor, group, merge_anchor, device)


@lru_cache(maxsize=256)
def _build(
    fields: tuple[Any, ...], factor: int, group: int, merge_anchor: bool, device: torch.device
) -> MergePlan:
    layout = TokenLayout(*fields)
    group = min(group, layout.frames)
    # Phases count inside the group, so that all full groups split alike and share one matmul.
    inside = torch.arange(layout.frames) % group
    is_destination = residues(group, layout.height, layout.width, factor)[inside] == 0  # [S, h*w]
    takes_part = torch.ones(layout.frames, dtype=torch.bool)
    if layout.anchor_frame is not None and not merge_anchor:
        takes_part[layout.anchor_frame] = False

    token = torch.arange(layout.tokens - layout.tail).view(layout.frames, -1)
    patch = token[:, layout.patch_start : layout.patch_start + layout.patches]
    aside = torch.ones(layout.tokens, dtype=torch.bool)
    destinations, sources, shapes = [], [], []
    for first in range(0, layout.frames, group):
        frames = slice(first, first + group)
        chosen = is_destination[frames] & takes_part[frames].view(-1, 1)
        if not chosen.any():  # nothing to join: the group stays whole
            continue
        others = ~is_destination[frames] & takes_part[frames].view(-1, 1)
        destinations.append(patch[frames][chosen])
        sources.append(patch[frames][others])
        shapes.append((len(destinations[-1]), len(sources[-1])))
        aside[destinations[-1]] = aside[sources[-1]] = False

    none = torch.empty(0, dtype=torch.int64)
    kept = torch.cat((aside.nonzero().squeeze(1), *destinations))
    source = torch.cat((none, *sources))
    restore = torch.empty(layout.tokens, dtype=torch.int64)
    restore[torch.cat((kept, source))] = torch.arange(layout.tokens)
    return MergePlan(
        kept.to(device), source.to(device), restore.to(device), _blocks(shapes, int(aside.sum()))
    )


def _blocks(shapes: list[tuple[int, int]], aside: int) -> tuple[GroupBlock, ...]:
    """Join consecutive groups of the same (destinations, sources) into blocks."""
    blocks: list[GroupBlock] = []
    first_destination, first_source = aside, 0
    for d, s in shapes:
        if blocks and (blocks[-1].destinations, blocks[-1].sources) == (d, s):
            last = blocks.pop()
            blocks.append(
                GroupBlock(last.groups + 1, d, s, last.first_destination, last.first_source)
            )
        else:
            blocks.append(GroupBlock(1, d, s, first_destination, first_source))
        first_destination += d
        first_source += s
    return tuple(blocks)
