"""Slow, obvious implementations to compare with: loops over frames, tokens and groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from spark3r.layout import TokenLayout
from spark3r.reduction.operators import LinearUnmerging
from spark3r.reduction.rule import ResolvedRule


@cache
def row_shift(factor: int) -> int:
    """Return the k with the widest lattice {(x, y): x + k·y = 0 mod r}, by trying short vectors."""

    def shortest(k: int) -> int:
        reach = range(-factor, factor + 1)
        return min(
            x * x + y * y
            for y in reach
            for x in reach
            if (x, y) != (0, 0) and (x + k * y) % factor == 0
        )

    best = 0
    for k in range(1, factor):
        if shortest(k) > shortest(best):
            best = k
    return best


@cache
def frame_shift(factor: int) -> int:
    golden = factor * (math.sqrt(5) - 1) / 2
    best = 1
    for c in range(1, factor + 1):
        if math.gcd(c, factor) == 1 and abs(c - golden) < abs(best - golden):
            best = c
    return best


def token_of(layout: TokenLayout, frame: int, y: int, x: int) -> int:
    start = 0 if layout.special_last else layout.special
    return frame * (layout.special + layout.height * layout.width) + start + y * layout.width + x


def in_subset(frame: int, y: int, x: int, factor: int) -> bool:
    return (x + row_shift(factor) * y + frame_shift(factor) * frame) % factor == 0


# Slow twins of key-value operators by name: whether the patch at (frame, y, x) stays.
KEPT_PATCHES: dict[str, Callable[[Any, int, int, int, int], bool]] = {
    "temporal_stride": lambda operator, frame, y, x, factor: frame % factor == 0,
    "token_stride": lambda operator, frame, y, x, factor: in_subset(frame, y, x, factor),
    "diverse_frames": lambda operator, frame, y, x, factor: frame % factor == 0,  # of slots
}


def far_apart(tokens: Tensor, layout: TokenLayout, factor: int) -> list[int]:
    """Return the frame of every slot: far ones in every r-th, the others in between."""
    described = []
    for frame in range(layout.frames):
        cells: dict[tuple[int, int], list[Tensor]] = {}
        for y in range(layout.height):
            for x in range(layout.width):
                cell = (y * 4 // layout.height, x * 4 // layout.width)
                cells.setdefault(cell, []).append(tokens[:, token_of(layout, frame, y, x)])
        described.append(torch.cat([torch.stack(each).mean(0) for each in cells.values()]))
    chosen = [layout.anchor_frame or 0]
    while len(chosen) < math.ceil(layout.frames / factor):

        def nearest(frame: int, taken: tuple[int, ...]) -> float:
            return min(float((described[frame] - described[t]).norm()) for t in taken)

        others = [frame for frame in range(layout.frames) if frame not in chosen]
        picks = tuple(chosen[:64])
        chosen.append(max(others, key=lambda frame: nearest(frame, picks)))
    chosen = [chosen[0], *sorted(chosen[1:])]
    rest = [frame for frame in range(layout.frames) if frame not in chosen]
    return [
        chosen[slot // factor] if slot % factor == 0 else rest[slot - slot // factor - 1]
        for slot in range(layout.frames)
    ]


# Slow twins of operators that choose by content, by name: the frame of every slot.
FRAMES_BY_SLOT: dict[str, Callable[[Tensor, TokenLayout, int], list[int]]] = {
    "diverse_frames": far_apart,
}


def kept_keys(layout: TokenLayout, rule: ResolvedRule, tokens: Tensor) -> dict[int, float]:
    """Return the bias on the logit of every key that stays, by token.

    ``tokens`` ``[B, N, C]`` is what operators that choose by content look at.
    """
    ops = rule.operators.key_value
    if ops.name not in FRAMES_BY_SLOT:
        return _kept_keys(layout, rule)
    frames = FRAMES_BY_SLOT[ops.name](tokens.double(), layout, rule.key_value)
    anchor = None if layout.anchor_frame is None else 0
    size = layout.tokens_per_frame
    return {
        token
        if token >= layout.frames * size
        else frames[token // size] * size + token % size: bias
        for token, bias in _kept_keys(replace(layout, anchor_frame=anchor), rule).items()
    }


def _kept_keys(layout: TokenLayout, rule: ResolvedRule) -> dict[int, float]:
    ops = rule.operators.key_value
    patch_stays = KEPT_PATCHES[ops.name]
    grid = [(y, x) for y in range(layout.height) for x in range(layout.width)]
    anchor = layout.anchor_frame if ops.keep_anchor else None
    kept: dict[int, float] = {}
    thinned: dict[str, list[int]] = {"patch": [], "special": []}
    stood_for = {"patch": 0, "special": 0}
    for frame in range(layout.frames):
        whole = frame == anchor
        strided = frame % rule.key_value == 0
        first = frame * layout.tokens_per_frame
        if layout.special_last:
            first += layout.height * layout.width
        tokens = [
            ("special", first + i, ops.keep_special or strided) for i in range(layout.special)
        ]
        for y, x in grid:
            stays = patch_stays(ops, frame, y, x, rule.key_value)
            tokens.append(("patch", token_of(layout, frame, y, x), stays))
        for kind, token, stays in tokens:
            if not whole:
                stood_for[kind] += 1
            if stays or whole:
                kept[token] = 0.0
                if not whole:
                    thinned[kind].append(token)
    for kind, those in thinned.items():
        for token in those:
            kept[token] = ops.mass_correction * math.log(stood_for[kind] / len(those))
    for offset in range(layout.tail):
        kept[layout.frames * layout.tokens_per_frame + offset] = 0.0
    return kept


def merge_groups(layout: TokenLayout, rule: ResolvedRule) -> list[tuple[list[int], list[int]]]:
    """Return destinations and sources of every group that is merged."""
    ops = rule.operators.query
    groups = []
    for first in range(0, layout.frames, ops.group):
        destinations: list[int] = []
        sources: list[int] = []
        for frame in range(first, min(first + ops.group, layout.frames)):
            if frame == layout.anchor_frame and not ops.merge_anchor:
                continue
            for y in range(layout.height):
                for x in range(layout.width):
                    chosen = in_subset(frame - first, y, x, rule.query)
                    (destinations if chosen else sources).append(token_of(layout, frame, y, x))
        if destinations:
            groups.append((destinations, sources))
    return groups


def merge_sets(query: Tensor, layout: TokenLayout, rule: ResolvedRule) -> list[list[int]]:
    """Return sets of tokens of a sequence ``[H, N, D]`` that share a query, destination first."""
    features = query.double().sum(dim=0)
    sets: dict[int, list[int]] = {token: [token] for token in range(query.shape[1])}
    for destinations, sources in merge_groups(layout, rule):
        towards = torch.stack([features[d] / features[d].norm() for d in destinations])
        for source in sources:
            best = destinations[int((towards @ features[source]).argmax())]
            sets[best].append(source)
            del sets[source]
    return list(sets.values())


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, rule: ResolvedRule
) -> Tensor:
    """Return reduced attention of full queries, keys and values ``[B, H, N, D]``, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    batch, _, n, dim = query.shape
    tokens = key.transpose(1, 2).flatten(2)
    mask = torch.zeros(n, dtype=torch.float64)
    if rule.key_value > 1:
        mask += -math.inf
        for token, bias in kept_keys(layout, rule, tokens).items():
            mask[token] = bias
    output = torch.empty_like(query)
    for b in range(batch):
        sets = merge_sets(query[b], layout, rule) if rule.query > 1 else [[t] for t in range(n)]
        merged = torch.stack([query[b][:, members].mean(dim=1) for members in sets], dim=1)
        logits = merged @ key[b].transpose(1, 2) / math.sqrt(dim) + mask
        attended = logits.softmax(dim=-1) @ value[b]
        slope = None
        if rule.query > 1:
            slope = SLOPES[rule.operators.query.unmerge](merged, attended, sets, layout, rule)
        for place, members in enumerate(sets):
            for token in members:
                output[b, :, token] = attended[:, place]
                if slope is not None:
                    apart = (query[b][:, token] - merged[:, place]).flatten()
                    output[b, :, token] += (apart @ slope).view(-1, dim)
    return output


def fit(
    merged: Tensor, attended: Tensor, sets: list[list[int]], layout: TokenLayout, rule: ResolvedRule
) -> Tensor:
    """Return the ridge regression of output differences on query differences, ``[H·D, H·D]``."""
    unmerging = rule.operators.query.unmerging
    assert isinstance(unmerging, LinearUnmerging)
    place = {members[0]: place for place, members in enumerate(sets)}
    groups = [[place[token] for token in tokens] for tokens, _ in merge_groups(layout, rule)]
    width = merged.shape[0] * merged.shape[2]
    if not groups:  # the anchor frame is the whole clip and takes no part
        return torch.zeros(width, width, dtype=torch.float64)
    wanted = unmerging.compared_per_feature * width
    share = wanted / sum(len(places) for places in groups)
    query_apart, output_apart = [], []
    for places in groups:
        count = min(len(places), math.ceil(len(places) * share))
        for one in (places[i * len(places) // count] for i in range(count)):
            feature = merged.sum(dim=0)
            cosines = {
                other: float(torch.cosine_similarity(feature[one], feature[other], dim=0))
                for other in places
                if other != one
            }
            for other in sorted(cosines, key=lambda o: -cosines[o])[: unmerging.partners]:
                query_apart.append((merged[:, other] - merged[:, one]).flatten())
                output_apart.append((attended[:, other] - attended[:, one]).flatten())
    if not query_apart:
        return torch.zeros(width, width, dtype=torch.float64)
    x, y = torch.stack(query_apart), torch.stack(output_apart)
    # The ridge is written as further rows of a plain least squares problem.
    ridge = (unmerging.ridge * x.square().sum() / width).sqrt() * torch.eye(width, dtype=x.dtype)
    return torch.linalg.lstsq(torch.cat((x, ridge)), torch.cat((y, 0 * ridge))).solution


# Slow twins of the ways of unmerging by name: the map that tells outputs of one place apart.
SLOPES: dict[str, Callable[..., Tensor | None]] = {"copy": lambda *_: None, "linear": fit}
