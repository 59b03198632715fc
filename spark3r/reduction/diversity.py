"""Frames far apart by what they show, chosen on the device inside a pass.

Each layer that asks for them describes the frames by its own input: the mean token of each of
`CELLS` × `CELLS` cells of the patch grid. Farthest-point sampling then begins with the anchor and
takes, again and again, the frame that is farthest from all taken ones. Nothing is remembered from
layer to layer, so threads, gradient checkpointing and compiled graphs need not agree on anything.

This is the one loop over frames in a pass. It has at most `MOST_PICKS` steps of three small
kernels; frames beyond them are the farthest from all picks. Shapes depend on the layout alone, and
the host reads nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import TokenLayout

CELLS = 4
"""Rows and columns of cells, of each of which a frame's description holds the mean token."""

MOST_PICKS = 64
"""Most frames that are picked one after the other."""


def frames_by_slot(tokens: Tensor, layout: TokenLayout, factor: int) -> Tensor:
    """Return frames in an order in which every r-th one is far from the others: ``[S]`` int64.

    The frames in slots 0, r, 2r, ... are the chosen ones: the anchor (frame 0 without one), and
    then the others as they follow in the clip. The rest fill the other slots, as they follow.

    Args:
        tokens: Hidden states or keys of all tokens, ``[B, N, C]``. The clips of a batch have one
            order, by their distances summed.
        layout: Token layout of the clip.
        factor: Factor r, at most the number of frames.
    """
    count = -(-layout.frames // factor)
    chosen = farthest_frames(distances(tokens, layout), layout.anchor_frame or 0, count)
    chosen = torch.cat((chosen[:1], chosen[1:].sort().values))
    taken = torch.zeros(layout.frames, dtype=torch.uint8, device=tokens.device)
    rest = taken.index_fill(0, chosen, 1).argsort(stable=True)[: layout.frames - count]
    slot = torch.arange(layout.frames, device=tokens.device)
    place = torch.where(slot % factor == 0, slot // factor, count + slot - slot // factor - 1)
    return torch.cat((chosen, rest)).index_select(0, place)


def distances(tokens: Tensor, layout: TokenLayout) -> Tensor:
    """Return squared distances of the frames' descriptions, ``[S, S]``, in float32 or wider.

    Args:
        tokens: Tokens ``[B, N, C]``.
        layout: Their layout.
    """
    start, device = layout.patch_start, tokens.device
    rows = torch.arange(layout.height, device=device) * CELLS // layout.height
    columns = torch.arange(layout.width, device=device) * CELLS // layout.width
    cell = (rows[:, None] * CELLS + columns).flatten()
    member = cell == torch.arange(CELLS**2, device=device)[:, None]
    mean = member / member.sum(dim=1, keepdim=True).clamp_min(1)  # [cells, patches]
    by_frame = tokens[:, : layout.frames * layout.tokens_per_frame].unflatten(
        1, (layout.frames, layout.tokens_per_frame)
    )
    patches = by_frame[:, :, start : start + layout.patches]
    with torch.autocast(device.type, enabled=False):
        described = mean.to(tokens.dtype) @ patches
        wide = torch.promote_types(tokens.dtype, torch.float32)
        described = described.to(wide).transpose(0, 1).flatten(1)  # [S, B * cells * C]
        described = described - described.mean(dim=0)  # which cancels less below
        products = described @ described.T
    size = products.diagonal()
    return (size[:, None] + size - 2 * products).clamp_min(0)


def farthest_frames(distance: Tensor, first: int, count: int) -> Tensor:
    """Return ``count`` frames by farthest-point sampling, in the order in which they are taken.

    Args:
        distance: Distances ``[S, S]``, at least 0.
        first: The frame that is taken first.
        count: Number of frames, at most S.
    """
    # A frame that is taken is nearer to the taken ones than any other, also among equal frames.
    distance = distance.diagonal_scatter(torch.full_like(distance[0], -1.0))
    pick = torch.full((1,), first, dtype=torch.int64, device=distance.device)
    closest, picks = distance[first], [pick]
    for _ in range(min(count, MOST_PICKS) - 1):
        pick = closest.argmax(dim=0, keepdim=True)
        picks.append(pick)
        closest = torch.minimum(closest, distance.index_select(0, pick)[0])
    if count > MOST_PICKS:
        picks.append(closest.topk(count - MOST_PICKS).indices)
    return torch.cat(picks)
