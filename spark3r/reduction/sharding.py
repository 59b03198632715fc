"""One clip over several ranks: who holds which frames, and what they exchange.

Each rank holds a run of whole query groups, so matching, merging and unmerging are its own. Every
query attends to the kept keys and values of all ranks. These are gathered after projection, norm
and rotary embedding, in the running precision. A layer that keeps all keys gathers all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LayoutError, PatchError
from ..layout import TokenLayout
from ..ranks import LOST, all_gather, loss_told
from .operators import QueryMerging
from .rule import ResolvedRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class Shard:
    """A rank's place among those that share a pass.

    Attributes:
        whole: Token layout of the whole clip.
        starts: Number of the first frame of each rank, and at the end the number of frames.
        rank: Number of this rank in the group.
        group: Process group of the ranks; None if nothing is exchanged.
    """

    whole: TokenLayout
    starts: tuple[int, ...]
    rank: int = 0
    group: ProcessGroup | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of frames of each rank."""
        return tuple(b - a for a, b in pairwise(self.starts))

    @property
    def frames(self) -> slice:
        """The frames of this rank."""
        return slice(self.starts[self.rank], self.starts[self.rank + 1])

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Gathering:
        """Begin to gather rows ``[n, ...]`` of all ranks.

        Args:
            rows: Rows of this rank.
            counts: Number of rows of each rank.
        """
        most = max(counts)
        sent = rows.contiguous()
        if len(rows) < most:
            sent = rows.new_zeros((most, *rows.shape[1:]))
            sent[: len(rows)] = rows
        received = sent.new_empty((len(counts) * most, *rows.shape[1:]))
        with loss_told(LOST):
            work = all_gather(received, sent, self.group)
        return Gathering(work, sent, received)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, in its place."""
        with loss_told(LOST):
            dist.all_reduce(values, group=self.group)
        return values


@dataclass
class Gathering:
    """A gathering under way.

    Attributes:
        work: The work to wait for.
        sent: Rows that this rank sends, which live until then.
        received: Rows of all ranks. Each rank has as many as the one that has most.
    """

    work: Any
    sent: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        """Return the rows when they are there."""
        with loss_told(LOST):
            self.work.wait()
        return self.received


@dataclass(frozen=True)
class ShardedLayout(TokenLayout):
    """The token layout of one rank's frames.

    Attributes:
        shard: The rank's place among those that share the pass.
    """

    shard: Shard = field(kw_only=True)


def sharded(shard: Shard) -> ShardedLayout:
    """Return the layout of a rank's frames. A rank without the anchor frame has none."""
    whole, own = shard.whole, shard.frames
    anchor = whole.anchor_frame
    inside = anchor is not None and own.start <= anchor < own.stop
    return ShardedLayout(
        own.stop - own.start,
        whole.height,
        whole.width,
        whole.special,
        whole.special_last,
        anchor_frame=anchor - own.start if anchor is not None and inside else None,
        shard=shard,
    )


def unit(rules: Iterable[ResolvedRule]) -> int:
    """Return the number of frames that stay together: whole query groups of all layers.

    Raises:
        PatchError: If an operator may mix queries of different groups, as those of others may, or
            compares all frames of the clip.
    """
    rules = tuple(rules)
    for rule in rules:
        if rule.key_value > 1 and rule.operators.key_value.by_content:
            raise PatchError(
                f"'{rule.operators.key_value.name}' compares all frames of a clip, so one clip "
                "cannot be shared by several ranks: use another key-value operator"
            )
    merging = [rule.operators.query for rule in rules if rule.query > 1]
    for operator in merging:
        if type(operator) is not QueryMerging:
            raise PatchError(
                f"{type(operator).__name__} is not known to merge queries inside groups of frames "
                "alone, so one clip cannot be shared by several ranks: use QueryMerging"
            )
    return math.lcm(*(operator.group for operator in merging))


def deal(frames: int, ranks: int, size: int) -> tuple[int, ...]:
    """Return the first frame of each rank, and at the end the number of frames.

    Args:
        frames: Number of frames of the clip.
        ranks: Number of ranks.
        size: Frames that stay together, see `unit`.

    Raises:
        LayoutError: If there are fewer groups than ranks.
    """
    groups = -(-frames // size)
    if groups < ranks:
        what = f"{groups} groups of {size} frames" if size > 1 else f"{frames} frames"
        raise LayoutError(
            f"a clip of {frames} frames has {what}, fewer than the {ranks} ranks that are to share "
            f"it: start at most {groups} ranks"
        )
    return tuple(min(frames, size * (groups * rank // ranks)) for rank in range(ranks + 1))


@dataclass(frozen=True, eq=False)
class RankPool:
    """The part of the other ranks in linear unmerging; see `merging.Pool`.

    Attributes:
        destinations: Number of destinations of the whole clip.
        shard: The rank's place among those that share the pass.
    """

    destinations: int
    shard: Shard

    def sum(self, *parts: Tensor) -> list[Tensor]:
        """Return sums over all ranks of tensors ``[B, ...]``, by one exchange."""
        flat = torch.cat([each.reshape(len(each), -1) for each in parts], dim=1)
        sums = self.shard.sum(flat).split([each[0].numel() for each in parts], dim=1)
        return [each.view_as(part) for each, part in zip(sums, parts, strict=True)]
