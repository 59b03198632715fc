"""What several ranks agree on when a pass over one clip begins, and which frames each holds."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..errors import LayoutError
from ..layout import TokenLayout
from ..ranks import LOST, all_gather, loss_told
from ..reduction.plans import destinations
from ..reduction.sharding import Shard, ShardedLayout, deal, sharded, unit
from ..schedule import Schedule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def share(schedule: Schedule, frames: int, group: ProcessGroup) -> slice:
    """Return the frames of a clip that this rank holds: a run of whole query groups.

    Args:
        schedule: The schedule of the pass.
        frames: Number of frames of the whole clip.
        group: Process group of the ranks.

    Raises:
        LayoutError: If there are fewer query groups than ranks.
        PatchError: If the schedule cannot be shared.
    """
    rank = dist.get_rank(group)
    starts = deal(frames, dist.get_world_size(group), unit(schedule.resolve(frames)))
    return slice(starts[rank], starts[rank + 1])


def agree(
    batch: int, own: TokenLayout, schedule: Schedule, group: ProcessGroup, device: torch.device
) -> ShardedLayout:
    """Return the layout of this rank's frames in the clip that all ranks begin together.

    The ranks exchange the lengths of their parts, which waits for the device once in a pass.

    Args:
        batch: Number of clips.
        own: Token layout of this rank's frames, as the family knows it.
        schedule: The schedule.
        group: Process group of the ranks.
        device: Device that the model computes on.

    Raises:
        LayoutError: If parts do not make one clip, or do not begin with whole query groups.
        RankError: If another rank ended.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    anchor = -1 if own.anchor_frame is None else own.anchor_frame
    facts = [batch, own.height, own.width, own.special, own.tail, anchor, _digest(schedule)]
    told = torch.tensor([own.frames, *facts], device=device)
    heard = told.new_empty(ranks * len(told))
    with loss_told(LOST):
        all_gather(heard, told, group).wait()
    parts = heard.view(ranks, -1).tolist()
    counts = [part[0] for part in parts]
    for number, part in enumerate(parts):
        if part[1:] != parts[0][1:]:
            raise LayoutError(
                f"rank {number} and rank 0 do not begin the same pass: {_words(part)}, and "
                f"{_words(parts[0])}. All ranks need the same schedule, batch size and frame size"
            )
    if own.tail:
        raise LayoutError(
            f"{own.tail} tokens follow after all frames, which several ranks cannot share: run the "
            "model in one process"
        )
    starts = tuple(sum(counts[:number]) for number in range(ranks + 1))
    whole = TokenLayout(
        *(starts[-1], own.height, own.width, own.special, own.special_last),
        anchor_frame=own.anchor_frame,
    )
    rules = schedule.resolve(whole.frames)
    size = unit(rules)
    if any(start % size for start in starts[:-1]):
        dealt = deal(whole.frames, ranks, size)
        raise LayoutError(
            f"the ranks hold {', '.join(map(str, counts))} frames, but queries are merged in "
            f"groups of {size} frames, which cannot be divided: let the ranks begin at frames "
            f"{', '.join(map(str, dealt[:-1]))}, as handle.share({whole.frames}) says"
        )
    for rule in schedule.resolve_within(whole):
        if rule.query > 1 and rule.operators.query.unmerging.fits_map:
            found = destinations(whole, rule).split(counts)
            if not all(int(each.sum()) for each in found):
                raise LayoutError(
                    "a rank holds no patch that queries are merged to, so it cannot take part in "
                    "linear unmerging: start fewer ranks"
                )
    return sharded(Shard(whole, starts, rank, group))


def _digest(schedule: Schedule) -> int:
    """Return a number by which ranks find that their schedules differ."""
    return int.from_bytes(hashlib.sha256(repr(schedule).encode()).digest()[:7], "big")


def _words(part: list[int]) -> str:
    frames, batch, height, width, special, *_, schedule = part
    return (
        f"{batch} x {frames} frames of {height}x{width} patches and {special} special tokens, "
        f"schedule {schedule:x}"
    )
