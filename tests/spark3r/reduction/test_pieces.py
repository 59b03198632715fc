"""The query side in pieces: the same bits as whole, and a bounded number of small pieces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qkv import hidden, random_qkv, reduced
from strategies import layouts, rules
from tiers import examples
from torch import Tensor

from spark3r.layout import TokenLayout
from spark3r.reduction.gathering import Keys
from spark3r.reduction.operators import Operators, QueryMerging, TokenStride
from spark3r.reduction.pieces import MOST_PIECES, attend_in_pieces, pieces
from spark3r.reduction.plans import select
from spark3r.reduction.rule import ResolvedRule, clamp

few = settings(max_examples=examples(30), deadline=None)


def _in_pieces(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, rule: ResolvedRule, most: int
) -> tuple[Tensor, list[slice]]:
    selection = select(layout, rule, query.device, tokens=hidden(key))
    if selection is not None:
        key, value = selection.take(key, 2), selection.take(value, 2)
    asked: list[slice] = []

    def query_of(tokens: slice) -> Tensor:
        asked.append(tokens)
        return query[:, :, tokens]

    found = attend_in_pieces(
        pieces(layout, rule, most),
        query_of,
        lambda output: 2 * output.transpose(1, 2).flatten(2),
        Keys(key, value, layout, rule, selection),
        layout,
        rule,
    )
    return found, asked


@st.composite
def cut(draw: st.DrawFn) -> tuple[TokenLayout, ResolvedRule]:
    """Draw a layout and a rule whose query side can run in pieces."""
    layout = draw(layouts(30))
    layout = replace(layout, frames=layout.frames + 8, height=layout.height + 1)
    drawn = draw(rules())
    merging = replace(drawn.operators.query, group=draw(st.integers(1, 8)))
    rule = replace(drawn, query=draw(st.integers(2, 9)))
    return layout, clamp(replace(rule, operators=replace(rule.operators, query=merging)), layout)


@few
@given(cut(), st.integers(1, 100), st.integers(1, 2))
def test_pieces_give_the_same_bits(
    drawn: tuple[TokenLayout, ResolvedRule], most: int, batch: int
) -> None:
    layout, rule = drawn
    most = min(most, layout.tokens - 1)
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = random_qkv(layout, batch, dtype)
        expected = reduced(query, key, value, layout, rule)
        found, _ = _in_pieces(query, key, value, layout, rule, most)
        assert torch.equal(found, 2 * expected.transpose(1, 2).flatten(2))


@few
@given(layouts(), rules(), st.integers(1, 300))
def test_pieces_are_whole_groups_one_after_the_other(
    layout: TokenLayout, rule: ResolvedRule, most: int
) -> None:
    rule = clamp(rule, layout)
    found = pieces(layout, rule, most)
    assert len(found) != 1
    assert len(found) <= MOST_PIECES
    if not found:
        return
    group = rule.operators.query.group * layout.tokens_per_frame
    assert [each.tokens.start for each in found] == [0, *(e.tokens.stop for e in found[:-1])]
    assert all(each.tokens.start % group == 0 for each in found)
    assert found[-1].tokens.stop == layout.tokens
    lengths = [each.layout.tokens for each in found]
    assert lengths == [each.tokens.stop - each.tokens.start for each in found]
    if len(found) < MOST_PIECES:
        assert max(lengths) <= max(most + group, 2 * group)


def test_queries_of_one_piece_are_asked_for_at_a_time() -> None:
    layout = TokenLayout(frames=100, height=3, width=4, special=2, anchor_frame=0)
    rule = ResolvedRule(4, 8, Operators(QueryMerging(group=10), TokenStride(mass_correction=1.0)))
    query, key, value = random_qkv(layout)
    _, asked = _in_pieces(query, key, value, layout, rule, most=300)
    assert asked == [slice(280 * i, 280 * (i + 1)) for i in range(5)]


class _Own(QueryMerging):
    """An operator that may compare tokens of different groups."""


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        (TokenLayout(40, 3, 4), ResolvedRule(1, 4)),
        (TokenLayout(20, 3, 4), ResolvedRule(4, 4)),  # a single group
        (TokenLayout(40, 3, 4), ResolvedRule(4, 4, Operators(_Own(group=4)))),
    ],
)
def test_what_is_not_known_to_be_the_same_in_pieces_runs_whole(
    layout: TokenLayout, rule: ResolvedRule
) -> None:
    assert pieces(layout, rule, 20) == ()
