"""Reduced attention whose query side runs on some frames at a time, which lowers peak memory.

The queries of a whole clip, before and after their norm and rotary embedding, and the outputs of
all tokens take gigabytes on a long clip, though attention reads the merged queries alone. Here the
queries of a piece (some whole merging groups) are made, matched and merged before those of the next
piece. After attention the pieces are unmerged one by one, too. Attention gets the same merged
queries in the same order as in `attention.attend`, so results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import TokenLayout
from . import merging, unmerging
from .attention import attend_to_selected
from .gathering import Keys
from .operators import CopyUnmerging, LinearUnmerging, QueryMerging
from .plans import plan
from .rule import ResolvedRule
from .steps import step

MOST_PIECES = 8
"""Bound on the number of pieces, and so on the kernels that a layer launches."""

_BY_TOKEN = (CopyUnmerging.unmerge, LinearUnmerging.unmerge)

QueriesOf = Callable[[slice], Tensor]
"""From tokens of the sequence to their queries ``[B, H, n, D]``, after norm and rotation."""


class Piece(NamedTuple):
    """Some whole merging groups of a clip.

    Attributes:
        tokens: Their tokens in the sequence.
        layout: Token layout of these tokens alone.
    """

    tokens: slice
    layout: TokenLayout


def pieces(layout: TokenLayout, rule: ResolvedRule, most_tokens: int) -> tuple[Piece, ...]:
    """Return the pieces in which the query side of a layer can run; none if it must run whole.

    It runs whole if no query is merged, or if the operators may mix tokens of different groups, as
    those of others may.

    Args:
        layout: Token layout of the pass.
        rule: Rule of the layer.
        most_tokens: Tokens of a piece, unless a single group has more or `MOST_PIECES` such pieces
            are too few.
    """
    operator = rule.operators.query
    known = type(operator) is QueryMerging and type(operator.unmerging).unmerge in _BY_TOKEN
    if not known or rule.query == 1:
        return ()
    groups = -(-layout.frames // operator.group)
    count = min(groups, MOST_PIECES, -(-layout.tokens // most_tokens))
    if count < 2:
        return ()
    ends = [operator.group * (groups * i // count) for i in range(count)] + [layout.frames]
    return tuple(_piece(layout, *ends[i : i + 2]) for i in range(count))


def attend_in_pieces(
    parts: Iterable[Piece],
    query_of: QueriesOf,
    finish: Callable[[Tensor], Tensor],
    keys: Keys,
    layout: TokenLayout,
    rule: ResolvedRule,
) -> Tensor:
    """Return reduced attention, finished piece by piece.

    Args:
        parts: The layout's `pieces`, at least two.
        query_of: Function that makes the queries of some tokens, in the values' dtype.
        finish: Function from outputs ``[B, H, n, D]`` to hidden states ``[B, n, C]``, such as the
            output projection.
        keys: Keys and values of the kept tokens. They are taken when all queries are merged.
        layout: Token layout of the N tokens.
        rule: Rule of the layer in this pass.

    Returns:
        Hidden states ``[B, N, C]``, without gradient.
    """
    like = keys.like
    whole = plan(layout, rule, like.device)
    assert whole is not None, "there are several groups, and each merges queries"
    unmerge = rule.operators.query.unmerging
    linear = unmerge if isinstance(unmerge, LinearUnmerging) else None
    merged = like.new_empty((like.shape[0], len(whole.kept), *like.shape[1::2])).transpose(1, 2)
    waiting: list[tuple[slice, Tensor, Tensor | None]] = []  # tokens, their places and queries
    # As in the whole sequence, tokens that are never merged come first, then the destinations.
    aside, joined = 0, whole.blocks[0].first_destination
    for piece in parts:
        query = query_of(piece.tokens)
        places, left, count = _merge(query, piece.layout, rule, merged, aside, joined)
        waiting.append((piece.tokens, places, None if linear is None else query))
        del query  # before the next ones are made
        aside, joined = aside + left, joined + count
    output = attend_to_selected(merged, *keys.take(), keys.selection)
    output = output.transpose(1, 2).contiguous().transpose(1, 2)  # as fused attention leaves it
    slope = None if linear is None else step("unmerging", linear.fit, merged, output, whole)
    if linear is None:
        del merged
    found: Tensor | None = None
    while waiting:
        tokens, places, own = waiting.pop(0)
        if slope is None or own is None:
            part = step("unmerging", merging.copy_back, output, places)
        else:
            part = step("unmerging", unmerging.move_by_map, own, merged, output, places, slope)
        del own
        part = finish(part)
        if found is None:
            found = part.new_empty((part.shape[0], layout.tokens, part.shape[2]))
        found[:, tokens] = part
        del part
    assert found is not None
    return found


def _piece(layout: TokenLayout, start: int, stop: int) -> Piece:
    """Return the piece of the frames from ``start`` to before ``stop``."""
    anchor = None
    if layout.anchor_frame is not None and start <= layout.anchor_frame < stop:
        anchor = layout.anchor_frame - start
    length = layout.tokens_per_frame
    tail = layout.tail if stop == layout.frames else 0
    own = replace(layout, frames=stop - start, anchor_frame=anchor, tail=tail, masked=None)
    return Piece(slice(start * length, stop * length + tail), own)


def _merge(
    query: Tensor, layout: TokenLayout, rule: ResolvedRule, merged: Tensor, aside: int, joined: int
) -> tuple[Tensor, int, int]:
    """Write a piece's merged queries.

    Args:
        query: Queries of its tokens, ``[B, H, n, D]``.
        layout: Its token layout.
        rule: Rule of the layer.
        merged: Merged queries of the whole sequence, ``[B, H, K, D]``.
        aside: Place of the piece's first token that is never merged.
        joined: Place of its first destination.

    Returns:
        Places of its tokens ``[B, n]``, and how many are never merged and how many are
        destinations.
    """
    own = plan(layout, rule, query.device)
    if own is None:  # the anchor frame alone, which takes no part
        left, count = query.shape[2], 0
        merged[:, :, aside : aside + left] = query
        places = torch.arange(aside, aside + left, device=query.device)
        return places.expand(query.shape[0], -1), left, count
    places = step("matching", merging.match, query, own, rule.operators.query.features)
    left = own.blocks[0].first_destination
    count = len(own.kept) - left
    short = step("merging", merging.merge, query, places, left + count)
    merged[:, :, aside : aside + left] = short[:, :, :left]
    merged[:, :, joined : joined + count] = short[:, :, left:]
    places = torch.where(places < left, places + aside, places + (joined - left))
    return places, left, count
