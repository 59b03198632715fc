"""One clip over several ranks: reduced attention is that of one process, and bytes are counted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qkv import random_qkv, reduced
from strategies import layouts, rules
from tiers import examples
from torch import Tensor

from spark3r.errors import LayoutError, PatchError
from spark3r.layout import TokenLayout
from spark3r.reduction.attention import attend
from spark3r.reduction.gathering import Keys, arrange, kept_counts, received_bytes
from spark3r.reduction.operators import DiverseFrames, Operators, QueryMerging, TokenStride
from spark3r.reduction.pieces import attend_in_pieces, pieces
from spark3r.reduction.plans import destinations, select
from spark3r.reduction.rule import ResolvedRule, clamp
from spark3r.reduction.sharding import Shard, ShardedLayout, deal, sharded, unit

few = settings(max_examples=examples(30), deadline=None)


class Meeting:
    """Exchanges between threads that stand for ranks."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=20)
        self.brought: list[Any] = [None] * ranks
        self.bytes: list[int] = []

    def exchange(self, rank: int, brought: Tensor) -> list[Tensor]:
        self.brought[rank] = brought
        self.barrier.wait()
        found = list(self.brought)
        self.barrier.wait()
        return found


@dataclass
class There:
    rows: Tensor

    def wait(self) -> Tensor:
        return self.rows


@dataclass(frozen=True, eq=False)
class ThreadShard(Shard):
    """A rank that is a thread, and exchanges tensors without `torch.distributed`."""

    meeting: Meeting = field(kw_only=True)

    def gather(self, rows: Tensor, counts: Sequence[int]) -> There:
        assert len(rows) == counts[self.rank]
        padded = rows.new_full((max(counts), *rows.shape[1:]), torch.nan)
        padded[: len(rows)] = rows
        self.meeting.bytes.append(padded.numel() * padded.element_size())
        return There(torch.cat(self.meeting.exchange(self.rank, padded)))

    def sum(self, values: Tensor) -> Tensor:
        return values.copy_(torch.stack(self.meeting.exchange(self.rank, values.clone())).sum(0))


def on_ranks(
    whole: TokenLayout, starts: tuple[int, ...], run: Callable[[ShardedLayout, slice], Tensor]
) -> tuple[Tensor, Meeting]:
    """Return what all ranks return side by side. ``run`` gets a layout, and its tokens."""
    meeting = Meeting(len(starts) - 1)
    found: list[Any] = [None] * (len(starts) - 1)

    def work(rank: int) -> None:
        shard = ThreadShard(whole, starts, rank, meeting=meeting)
        size = whole.tokens_per_frame
        tokens = slice(size * shard.frames.start, size * shard.frames.stop)
        try:
            found[rank] = run(sharded(shard), tokens)
        except BaseException as error:
            found[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return torch.cat(found, dim=2), meeting


def attended(
    query: Tensor, key: Tensor, value: Tensor, rule: ResolvedRule
) -> Callable[[ShardedLayout, slice], Tensor]:
    def run(layout: ShardedLayout, tokens: slice) -> Tensor:
        own = [each[:, :, tokens] for each in (query, key, value)]
        selection = select(layout, rule, query.device)
        if selection is not None:
            own[1:] = (selection.take(each, 2) for each in own[1:])
        keys = Keys(own[1], own[2], layout, rule, selection)
        return attend(own[0], *keys.take(), layout, rule, keys.selection)

    return run


@st.composite
def dealt(draw: st.DrawFn) -> tuple[TokenLayout, ResolvedRule, tuple[int, ...]]:
    """Draw a layout, a rule and a way to deal the frames out in whole groups."""
    layout = replace(draw(layouts(30)), tail=0)
    anchor = None if layout.anchor_frame is None else 0
    layout = replace(layout, frames=layout.frames + 3, anchor_frame=anchor)
    drawn = draw(rules().filter(lambda rule: not rule.operators.key_value.by_content))
    merging = replace(drawn.operators.query, group=draw(st.integers(1, 7)))
    rule = clamp(replace(drawn, operators=replace(drawn.operators, query=merging)), layout)
    size = unit([rule])
    groups = -(-layout.frames // size)
    ranks = draw(st.integers(1, min(4, groups)))
    cuts = draw(st.permutations(range(1, groups))) if groups > 1 else []
    starts = (0, *sorted(size * cut for cut in cuts[: ranks - 1]), layout.frames)
    return layout, rule, starts


@few
@given(dealt(), st.integers(1, 2))
def test_ranks_attend_as_one_process(
    drawn: tuple[TokenLayout, ResolvedRule, tuple[int, ...]], batch: int
) -> None:
    layout, rule, starts = drawn
    linear = rule.query > 1 and rule.operators.query.unmerging.fits_map
    counts = [b - a for a, b in pairwise(starts)]
    if linear and not all(int(each.sum()) for each in destinations(layout, rule).split(counts)):
        return  # refused when a pass begins
    query, key, value = random_qkv(layout, batch)
    found, _ = on_ranks(layout, starts, attended(query, key, value, rule))
    expected = reduced(query, key, value, layout, rule)
    # The sums of the fit are added in another order, and kernels take other numbers of queries.
    tolerance = 1e-7 if linear else 1e-12
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("unmerge", ["copy", "linear"])
def test_ranks_attend_in_pieces_as_one_process(unmerge: str) -> None:
    layout = TokenLayout(22, 3, 4, special=2, anchor_frame=0)
    operators = Operators(QueryMerging(group=3, unmerge=unmerge), TokenStride(keep_anchor=True))
    rule = ResolvedRule(3, 5, operators)
    query, key, value = random_qkv(layout)
    asked: list[int] = []

    def run(own: ShardedLayout, tokens: slice) -> Tensor:
        selection = select(own, rule, query.device)
        assert selection is not None
        kept = [selection.take(each[:, :, tokens], 2) for each in (key, value)]
        parts = pieces(own, rule, 50)
        asked.append(len(parts))
        return (
            attend_in_pieces(
                parts,
                lambda some: query[:, :, tokens][:, :, some],
                lambda output: output.transpose(1, 2).flatten(2),
                Keys(kept[0], kept[1], own, rule, selection),
                own,
                rule,
            )
            .unflatten(2, (query.shape[1], -1))
            .transpose(1, 2)
        )

    found, _ = on_ranks(layout, (0, 9, 22), run)
    assert min(asked) > 1
    torch.testing.assert_close(found, reduced(query, key, value, layout, rule))


def test_keys_ordered_by_mass_group_are_gathered_in_that_order() -> None:
    layout = TokenLayout(9, 3, 3, special=2, anchor_frame=0)
    rule = ResolvedRule(1, 4, Operators(key_value=TokenStride(True, True, 1.0)))
    whole = select(layout, rule, torch.device("cpu"), by_group=True)
    assert whole is not None
    assert whole.groups
    token = torch.arange(layout.tokens).view(1, 1, -1, 1).float()

    def run(own: ShardedLayout, tokens: slice) -> Tensor:
        selection = select(own, rule, token.device)
        assert selection is not None
        kept = selection.take(token[:, :, tokens], 2)
        counts, order = arrange(own.shard, whole)
        rows = own.shard.gather(kept.permute(2, 0, 1, 3), counts).wait()
        assert order is not None
        return rows.index_select(0, order).permute(1, 2, 0, 3)

    found, _ = on_ranks(layout, (0, 2, 9), run)
    for part in found.chunk(2, dim=2):
        assert part.flatten().tolist() == whole.positions().tolist()


def test_every_rank_sends_as_many_bytes_as_the_most_kept_tokens_have() -> None:
    layout = TokenLayout(10, 2, 3, special=1)
    rule = ResolvedRule(1, 4, Operators())  # frames 0, 4 and 8 stay
    query, key, value = (each.bfloat16() for each in random_qkv(layout))
    _, meeting = on_ranks(layout, (0, 5, 10), attended(query, key, value, rule))
    of_two_frames = 2 * layout.tokens_per_frame * 2 * 2 * 4 * 2  # k and v, 2 heads of 4, bfloat16
    assert meeting.bytes == [of_two_frames] * 2
    shard = Shard(layout, (0, 5, 10))
    assert kept_counts(shard, rule) == (14, 7)
    assert kept_counts(shard, ResolvedRule()) == (35, 35)
    assert received_bytes(shard, rule, width=8, itemsize=2) == of_two_frames


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 30))
def test_every_rank_gets_whole_groups(frames: int, ranks: int, size: int) -> None:
    groups = -(-frames // size)
    if groups < ranks:
        with pytest.raises(LayoutError, match=f"fewer than the {ranks} ranks .* at most {groups}"):
            deal(frames, ranks, size)
        return
    starts = deal(frames, ranks, size)
    assert (starts[0], starts[-1]) == (0, frames)
    assert all(start % size == 0 for start in starts[:-1])
    held = [-(-(b - a) // size) for a, b in pairwise(starts)]
    assert min(held) >= 1
    assert max(held) - min(held) <= 1


def test_frames_stay_together_in_the_groups_of_all_layers() -> None:
    def rule(query: int, group: int) -> ResolvedRule:
        return ResolvedRule(query, 3, Operators(QueryMerging(group=group)))

    assert unit([rule(1, 7), rule(2, 4), rule(3, 6)]) == 12
    assert unit([rule(1, 7)]) == 1

    class Across(QueryMerging):
        """Merges queries of different groups."""

    with pytest.raises(PatchError, match="Across is not known to merge queries inside groups"):
        unit([ResolvedRule(2, 1, Operators(Across()))])


def test_a_rank_without_the_anchor_frame_has_none() -> None:
    whole = TokenLayout(6, 2, 2, special=1, special_last=True, anchor_frame=2)
    found = [
        sharded(Shard(whole, (0, 2, 4, 6), rank, None))  # type: ignore[arg-type]
        for rank in range(3)
    ]
    assert [each.anchor_frame for each in found] == [None, 0, None]
    assert all(each.special_last and each.frames == 2 for each in found)


def test_operators_that_compare_all_frames_are_refused() -> None:
    rule = ResolvedRule(1, 3, Operators(key_value=DiverseFrames()))
    with pytest.raises(PatchError, match="'diverse_frames' compares all frames of a clip"):
        unit([ResolvedRule(), rule])
    assert unit([ResolvedRule(), replace(rule, key_value=1)]) == 1
