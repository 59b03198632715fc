"""FastVGGT's token merging as a benchmark's baseline, written from its description.

FastVGGT (arXiv 2509.02560) reduces queries, keys and values of global attention together, by one
bipartite matching over the whole clip:

- destinations are all of frame 0, every special token, and one token drawn at random, from a seed,
  of each 2×2 cell of the other frames;
- one token in ten, evenly spaced, is protected and stays as it is;
- every other token is a source and joins the destination with the most similar hidden state: the
  published ratio, 0.9 of all tokens, is more than the number of sources;
- after attention a source copies its destination's output.

It is not an operator of a schedule. It is measured beside ours with the same memory saver, and with
our merging, which is faster than the published one. Similarities are bfloat16 in chunks, as
published.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import TokenLayout
from ..patching.apply import replace_attention
from ..patching.patch import Patch
from ..reduction import merging
from ..reduction.rule import ResolvedRule
from ..reduction.steps import step
from ..runner import Runner
from ..sdpa import ReplaceSDPA

CELL = 2
PROTECTED = 0.1
SEED = 33
CHUNK = 5000
"""Number of sources that are compared with all destinations at once."""


@dataclass(frozen=True, eq=False)
class JointPlan:
    """The destinations, sources and protected tokens of a layout.

    Attributes:
        destinations: Positions of the destinations in the full sequence, ``[d]``.
        sources: Positions of the sources, ``[s]``.
        place_of_token: Index of each of the N tokens in the sequence of destinations, protected
            tokens and sources, ``[N]``.
        kept: Number of destinations and protected tokens.
    """

    destinations: Tensor
    sources: Tensor
    place_of_token: Tensor
    kept: int


def apply_fastvggt(runner: Runner) -> Patch:
    """Let the model's global attention merge as FastVGGT does until the patch is removed."""
    dense = ResolvedRule()

    def forward(
        attn: nn.Module, layout: TokenLayout, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        with ReplaceSDPA(partial(_attend, x, joint_plan(layout, x.device))):
            return runner.family.reduced_forward(attn, layout, dense, x, *args, **kwargs)

    return replace_attention(runner, forward)


def joint_plan(layout: TokenLayout, device: torch.device) -> JointPlan:
    """Return the plan of a layout, cached."""
    return _build(layout, device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _build(layout: TokenLayout, device: torch.device) -> JointPlan:
    frames, height, width = layout.frames, layout.height, layout.width
    rows, columns = height // CELL, width // CELL
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(CELL**2, (frames, rows, columns), generator=generator)
    y = CELL * torch.arange(rows).view(-1, 1) + drawn // CELL
    x = CELL * torch.arange(columns) + drawn % CELL
    patches = torch.zeros(frames, layout.patches, dtype=torch.bool)
    patches.scatter_(1, (y * width + x).flatten(1), True)
    patches[0] = True
    specials = torch.ones(frames, layout.special, dtype=torch.bool)
    halves = (patches, specials) if layout.special_last else (specials, patches)
    tail = torch.ones(layout.tail, dtype=torch.bool)
    is_destination = torch.cat((torch.cat(halves, dim=1).flatten(), tail))

    stays = torch.zeros(layout.tokens, dtype=torch.bool)
    protected = int(PROTECTED * layout.tokens)
    if protected:
        stays[:: layout.tokens // protected] = True
    parts = [
        mask.nonzero().squeeze(1)
        for mask in (is_destination, stays & ~is_destination, ~stays & ~is_destination)
    ]
    place_of_token = torch.empty(layout.tokens, dtype=torch.int64)
    place_of_token[torch.cat(parts)] = torch.arange(layout.tokens)
    return JointPlan(
        parts[0].to(device),
        parts[2].to(device),
        place_of_token.to(device),
        len(parts[0]) + len(parts[1]),
    )


def joint_places(hidden: Tensor, plan: JointPlan) -> Tensor:
    """Return the index of every token of ``[B, N, C]`` in the merged sequence, ``[B, N]``."""
    unit = F.normalize(hidden.detach().float(), dim=-1).bfloat16()
    towards = unit.index_select(1, plan.destinations).transpose(1, 2)
    sources = unit.index_select(1, plan.sources)
    best = [
        torch.bmm(sources[:, i : i + CHUNK], towards).max(dim=-1).indices
        for i in range(0, sources.shape[1], CHUNK)
    ]
    own = torch.arange(plan.kept, device=hidden.device).expand(hidden.shape[0], -1)
    return torch.cat((own, *best), dim=1).index_select(1, plan.place_of_token)


def _attend(
    hidden: Tensor, plan: JointPlan, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> Tensor:
    places = step("matching", joint_places, hidden, plan)
    query, key, value = (
        step("merging", merging.merge, tokens, places, plan.kept) for tokens in (query, key, value)
    )
    output = F.scaled_dot_product_attention(query, key, value, **kwargs)
    return step("unmerging", merging.copy_back, output, places)
