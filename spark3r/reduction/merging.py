"""Query merging inside groups of consecutive frames (Spark3R §IV-B), and copying back.

One query patch in r is a destination (see `lattice`). Every other patch, a source, joins the most
similar destination of its group by cosine of the mean over heads; ties go to the first. A
destination becomes the mean of itself and its sources, and after attention each of them copies its
output (`unmerging` does better). Special tokens and tail tokens are never merged, and the anchor
frame is left alone on request.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import nearest as fused
from ..layout import TokenLayout

SIMILARITY_ELEMENTS = 2**22
"""Similarities held at once on a CPU: 16 MiB in float32, which fits its caches best."""

SIMILARITY_ELEMENTS_GPU = 2**28
"""Similarities held at once on other devices: 1 GiB in float32, which the groups of the four
families fit in whole, so that products are few and equal. The row of one source may be longer than
either bound."""


@dataclass(frozen=True)
class GroupBlock:
    """Consecutive groups with equal numbers of destinations and sources.

    Attributes:
        groups: Number of groups n.
        destinations: Destinations per group d.
        sources: Sources per group s.
        first_destination: Place of the block's first destination in the merged sequence.
        first_source: Place of its first source in the list of sources.
    """

    groups: int
    destinations: int
    sources: int
    first_destination: int
    first_source: int


class Pool(Protocol):
    """The part of the other ranks in linear unmerging, where several share a clip."""

    @property
    def destinations(self) -> int:
        """Number of destinations of the whole clip."""

    def sum(self, *parts: Tensor) -> list[Tensor]:
        """Return sums over all ranks of tensors ``[B, ...]``, by one exchange."""


@dataclass(frozen=True, eq=False)
class MergePlan:
    """The part of query merging that depends on the layout alone.

    Attributes:
        kept: Positions in the full sequence of the merged sequence's tokens, ``[K]``: first the
            tokens that are never merged, then the destinations group by group.
        sources: Positions in the full sequence of the sources, ``[M]``, group by group.
        first_places: Place of each of the K kept tokens in the merged sequence, then for each
            source that of the first destination of its group, ``[K + M]``.
        place_of_token: Place of each of the N tokens in ``kept`` followed by ``sources``, ``[N]``.
        blocks: Runs of groups of equal size.
        pool: The part of the other ranks, if several share the clip.
    """

    kept: Tensor
    sources: Tensor
    first_places: Tensor
    place_of_token: Tensor
    blocks: tuple[GroupBlock, ...]
    pool: Pool | None = None

    def to(self, device: torch.device) -> MergePlan:
        """Return the plan with its tensors on a device."""
        return MergePlan(
            self.kept.to(device),
            self.sources.to(device),
            self.first_places.to(device),
            self.place_of_token.to(device),
            self.blocks,
            self.pool,
        )


def make_plan(
    layout: TokenLayout, destinations: Tensor, group: int, *, merge_anchor: bool
) -> MergePlan:
    """Return the merge plan of a layout, on the CPU.

    Args:
        layout: Token layout of the clip.
        destinations: Destinations among the patches of one group, ``[group, h * w]`` bool.
        group: Frames per group, at most those of the clip.
        merge_anchor: Whether the anchor frame's patches take part.
    """
    # Phases count from the group's first frame, so that all full groups share one product.
    inside = torch.arange(layout.frames, device="cpu") % group
    is_destination = destinations[inside]  # [S, h*w]
    takes_part = torch.ones(layout.frames, dtype=torch.bool, device="cpu")
    if layout.anchor_frame is not None and not merge_anchor:
        takes_part[layout.anchor_frame] = False

    token = torch.arange(layout.tokens - layout.tail, device="cpu").view(layout.frames, -1)
    patch = token[:, layout.patch_start : layout.patch_start + layout.patches]
    aside = torch.ones(layout.tokens, dtype=torch.bool, device="cpu")
    joined, sources, shapes = [], [], []
    for first in range(0, layout.frames, group):
        frames = slice(first, first + group)
        chosen = is_destination[frames] & takes_part[frames].view(-1, 1)
        if not chosen.any():  # without a destination the group stays whole
            continue
        others = ~is_destination[frames] & takes_part[frames].view(-1, 1)
        joined.append(patch[frames][chosen])
        sources.append(patch[frames][others])
        shapes.append((len(joined[-1]), len(sources[-1])))
        aside[joined[-1]] = aside[sources[-1]] = False

    none = torch.empty(0, dtype=torch.int64, device="cpu")
    kept = torch.cat((aside.nonzero().squeeze(1), *joined))
    source = torch.cat((none, *sources))
    own = torch.arange(len(kept), device="cpu")
    of_group = torch.tensor(shapes, dtype=torch.int64, device="cpu").view(-1, 2)
    first_of_group = len(kept) - of_group[:, 0].flip(0).cumsum(0).flip(0)
    first_places = torch.cat((own, first_of_group.repeat_interleave(of_group[:, 1])))
    place_of_token = torch.empty(layout.tokens, dtype=torch.int64, device="cpu")
    place_of_token[torch.cat((kept, source))] = torch.arange(layout.tokens, device="cpu")
    blocks = _blocks(shapes, int(aside.sum()))
    return MergePlan(kept, source, first_places, place_of_token, blocks)


def merged_length(
    layout: TokenLayout, destinations: Tensor, group: int, *, merge_anchor: bool
) -> int:
    """Return the length of the merged sequence, without listing its tokens.

    Args:
        layout: Token layout of the clip.
        destinations: Number of destinations by frame of one group, ``[group]`` int64.
        group: Frames per group, at most those of the clip.
        merge_anchor: Whether the anchor frame's patches take part.
    """
    frame = torch.arange(layout.frames, device="cpu")
    takes_part = torch.ones(layout.frames, dtype=torch.bool, device="cpu")
    if layout.anchor_frame is not None and not merge_anchor:
        takes_part[layout.anchor_frame] = False
    chosen = destinations[frame % group] * takes_part
    number = frame // group
    has_destination = torch.bincount(number, weights=chosen.double())[number] > 0
    sources = (layout.patches - chosen) * (takes_part & has_destination)
    return layout.tokens - int(sources.sum())


def head_mean(query: Tensor) -> Tensor:
    """Return the mean over heads of queries ``[B, H, N, D]``, ``[B, N, D]``, without gradient.

    The result is float32, or float64 for float64 queries.
    """
    return query.detach().mean(dim=1, dtype=torch.promote_types(query.dtype, torch.float32))


Search = Callable[[Tensor, Tensor, int], Tensor]
"""Function with the arguments and the result of `nearest`."""


def match(
    query: Tensor,
    plan: MergePlan,
    features: Callable[[Tensor], Tensor] = head_mean,
    search: Search | None = None,
) -> Tensor:
    """Return the place of every token in the merged sequence.

    Args:
        query: Queries ``[B, H, N, D]`` after query norm and rotary embedding.
        plan: Merge plan on the same device.
        features: Function from queries ``[B, H, N, D]`` to the compared features ``[B, N, C]``.
        search: Search for the most similar destinations; None takes `nearest`.

    Returns:
        Places, ``[B, N]`` int64. A source has the place of its most similar destination, every
        other token has its own. No gradient flows through it.
    """
    search = nearest if search is None else search
    with precisely(query.device):
        compared = features(query)
        kept, sources = compared.index_select(1, plan.kept), compared.index_select(1, plan.sources)
        own, first = plan.first_places.split((kept.shape[1], sources.shape[1]))
        places = [own.expand(kept.shape[0], -1)]
        for block in plan.blocks:
            n, d, s = block.groups, block.destinations, block.sources
            destination = kept.narrow(1, block.first_destination, n * d).unflatten(1, (n, d))
            source = sources.narrow(1, block.first_source, n * s).unflatten(1, (n, s))
            best = search(source, destination, 1).flatten(1)  # [B, n * s]
            places.append(best + first.narrow(0, block.first_source, n * s))
    return torch.cat(places, dim=1).index_select(1, plan.place_of_token)


def merge(query: Tensor, places: Tensor, length: int) -> Tensor:
    """Return the merged queries ``[B, H, K, D]``, the means over the tokens of each place.

    Sums accumulate in float32, or in float64 for float64 queries. They are deterministic, because
    each mean reads its tokens in sequence order. On CUDA a backward pass in bfloat16 needs torch
    2.6 or later.

    Args:
        query: Queries ``[B, H, N, D]``.
        places: Places from `match`, ``[B, N]``.
        length: Number of places K, the length of ``plan.kept``.
    """
    batch, heads, tokens, dim = query.shape
    rows, order = _rows(places, length).sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(batch * length, device=rows.device))
    side_by_side = query.transpose(1, 2).reshape(batch * tokens, heads * dim)
    means = F.embedding_bag(order, side_by_side, starts, mode="mean")
    return means.view(batch, length, heads, dim).transpose(1, 2)


def copy_back(output: Tensor, places: Tensor) -> Tensor:
    """Return outputs ``[B, H, K, D]`` copied to all tokens of their places, ``[B, H, N, D]``."""
    batch, heads, length, dim = output.shape
    side_by_side = output.transpose(1, 2).reshape(batch * length, heads * dim)
    copied = side_by_side.index_select(0, _rows(places, length))
    return copied.view(batch, -1, heads, dim).transpose(1, 2)


def nearest(source: Tensor, destination: Tensor, count: int, elements: int | None = None) -> Tensor:
    """Return the destinations with the largest cosines to each source, the largest first.

    Args:
        source: Features of s sources in each of n groups, ``[B, n, s, D]``.
        destination: Features of d destinations in each group, ``[B, n, d, D]``.
        count: Number of destinations to return per source, at most d.
        elements: Largest number of similarities held at once, unless one row has more; None takes
            `SIMILARITY_ELEMENTS` on a CPU and `SIMILARITY_ELEMENTS_GPU` elsewhere.

    Returns:
        Numbers of the destinations inside their group, ``[B, n, s, count]`` int64. With a count of
        1, ties go to the first.
    """
    batch, n, s, d = *source.shape[:3], destination.shape[2]
    # Sources stay as they are: their length does not change which destination is nearest.
    destination = F.normalize(destination, dim=-1)
    if count == 1 and elements is None and d:
        kernel = fused.implementation(source.device, source.dtype, source.shape[3])
        if kernel == fused.TRITON:
            return fused.apply(source, destination).unsqueeze(3)
    destination = destination.transpose(2, 3)
    bound = elements
    if bound is None:
        bound = SIMILARITY_ELEMENTS if source.device.type == "cpu" else SIMILARITY_ELEMENTS_GPU

    def found(source: Tensor, destination: Tensor) -> Tensor:
        similarity = source @ destination
        if count == 1:
            return similarity.max(dim=-1, keepdim=True).indices  # on a CPU faster than argmax
        return similarity.topk(count, dim=-1).indices

    groups = bound // (batch * s * d) if s else n
    if groups:
        pieces = [slice(i, i + groups) for i in range(0, n, groups)]
        return torch.cat([found(source[:, i], destination[:, i]) for i in pieces], dim=1)
    rows = max(1, bound // (batch * d))
    return torch.stack(
        [
            torch.cat(
                [found(source[:, i, j : j + rows], destination[:, i]) for j in range(0, s, rows)],
                dim=1,
            )
            for i in range(n)
        ],
        dim=1,
    )


def precisely(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast lowers no precision on the device."""
    # The meta device has no autocast; `spark3r.memory_count` follows that of any device there.
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


def _rows(places: Tensor, length: int) -> Tensor:
    """Return ``[B, N]`` places as row numbers of a ``[B * length, C]`` matrix."""
    if places.shape[0] == 1:
        return places.flatten()
    offset = length * torch.arange(places.shape[0], device=places.device)
    return (places + offset.unsqueeze(1)).flatten()


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
