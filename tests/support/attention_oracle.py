"""Spark3R's attention reduction written out slowly, from its definition, in float64.

It shares no code with ``spark3r.reduction``: loops over groups and tokens, a dense softmax. Only
the module's own projections, norms and rotary embedding are used.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor


def reduced_attention(
    attn: Any,
    x: Tensor,
    positions: Tensor | None,
    *,
    frames: int,
    grid: tuple[int, int],
    special: int,
    query: int,
    key_value: int,
    group: int = 20,
    patches_first: bool = False,
    tail: int = 0,
) -> tuple[Tensor, float]:
    """Return one attention module's output under the paper's operators.

    Args:
        attn: The upstream module, not patched.
        x: Hidden states ``[B, S * P, C]``.
        positions: Integer positions ``[B, S * P, 2]`` of its rotary embedding, or None.
        frames: Frames S.
        grid: Rows and columns of patches.
        special: Special tokens of each frame, before its patches or after them.
        query: Query factor, merged inside groups.
        key_value: Key-value factor, a temporal stride.
        group: Frames per group.
        patches_first: Whether a frame's special tokens stand after its patches.
        tail: Tokens after all frames, which are kept.

    Returns:
        The output in float64, and the least margin by which any source preferred its destination.
    """
    attn, x = deepcopy(attn).double(), x.double()
    batch, tokens, width = x.shape
    heads = attn.num_heads
    q, k, v = attn.qkv(x).chunk(3, dim=-1)
    q, k, v = (t.reshape(batch, tokens, heads, -1).transpose(1, 2) for t in (q, k, v))
    if attn.q_norm is not None:
        q, k = attn.q_norm(q), attn.k_norm(k)
    if positions is not None and getattr(attn, "rope", None) is not None:
        q, k = attn.rope(q, positions), attn.rope(k, positions)

    if getattr(attn, "use_scalable_softmax", False):
        q = q * math.log(tokens)
    if getattr(attn, "use_entropy_scaling", False):
        growth = attn.entropy_scaling_growth_factor * math.log(tokens)
        q = q * math.sqrt(growth / math.log(attn.base_token_count_for_entropy_scaling))

    per_frame, end = special + grid[0] * grid[1], tokens - tail
    kept = [t for t in range(tokens) if (t // per_frame) % key_value == 0 or t >= end]
    k, v = k[:, :, kept], v[:, :, kept]
    shift = _shifts(query)
    output = torch.empty_like(q)
    margin = math.inf
    for b in range(batch):
        rows, origin, least = _merge(
            q[b], frames, grid, special, query, group, shift, patches_first
        )
        margin = min(margin, least)
        for h in range(heads):
            merged = torch.stack([q[b, h, members].mean(dim=0) for members in rows])
            weights = (merged @ k[b, h].T / math.sqrt(q.shape[-1])).softmax(dim=-1)
            output[b, h] = (weights @ v[b, h])[origin]
    return attn.proj(output.transpose(1, 2).reshape(batch, tokens, width)), margin


def _merge(
    q: Tensor,
    frames: int,
    grid: tuple[int, int],
    special: int,
    factor: int,
    group: int,
    shift: tuple[int, int],
    patches_first: bool,
) -> tuple[list[list[int]], list[int], float]:
    """Return members of each merged query, each token's merged query, and the least margin."""
    per_frame = special + grid[0] * grid[1]
    rows: list[list[int]] = []
    origin = [-1] * q.shape[1]
    place_of_special = grid[0] * grid[1] if patches_first else 0
    place_of_patches = 0 if patches_first else special
    for token in range(frames * per_frame, q.shape[1]):
        origin[token] = len(rows)
        rows.append([token])
    sources: list[tuple[int, list[int]]] = []
    feature = q.mean(dim=0)  # over heads
    feature = feature / feature.norm(dim=1, keepdim=True)
    for first in range(0, frames, group):
        destinations, others = [], []
        for f in range(first, min(first + group, frames)):
            for s in range(special):
                token = f * per_frame + place_of_special + s
                origin[token] = len(rows)
                rows.append([token])
            for y in range(grid[0]):
                for x in range(grid[1]):
                    token = f * per_frame + place_of_patches + y * grid[1] + x
                    phase = x + shift[0] * y + shift[1] * (f - first)
                    (others if phase % factor else destinations).append(token)
        places = []
        for token in destinations or others:
            origin[token] = len(rows)
            places.append(len(rows))
            rows.append([token])
        if destinations:
            sources.extend((token, places) for token in others)
    margin = math.inf
    for token, places in sources:
        likeness = feature[[rows[place][0] for place in places]] @ feature[token]
        ranked = likeness.sort(descending=True)
        if len(places) > 1:
            margin = min(margin, float(ranked.values[0] - ranked.values[1]))
        origin[token] = places[int(ranked.indices[0])]
    for token, _ in sources:
        rows[origin[token]].append(token)
    return rows, origin, margin


def _shifts(factor: int) -> tuple[int, int]:
    """Return row and frame shift of the lattice, as docs/method/operators.md defines them."""
    reach = range(-factor, factor + 1)

    def evenness(k: int) -> int:
        lattice = ((x, y) for x in reach for y in reach if (x + k * y) % factor == 0)
        return min(x * x + y * y for x, y in lattice if (x, y) != (0, 0))

    golden = factor * (math.sqrt(5) - 1) / 2
    coprime = [c for c in range(1, factor + 1) if math.gcd(c, factor) == 1]
    return max(range(factor), key=evenness), min(coprime, key=lambda c: abs(c - golden))
