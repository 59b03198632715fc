"""Hypothesis strategies for layouts and rules."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st

from spark3r.layout import TokenLayout
from spark3r.reduction.operators import (
    KEY_VALUE_OPERATORS,
    UNMERGINGS,
    KeyValuePruning,
    Operators,
    QueryMerging,
)
from spark3r.reduction.rule import ResolvedRule


@st.composite
def layouts(draw: st.DrawFn, most_frames: int = 40) -> TokenLayout:
    frames = draw(st.integers(1, most_frames))
    return TokenLayout(
        frames=frames,
        height=draw(st.integers(1, 9)),
        width=draw(st.integers(1, 7)),
        special=draw(st.integers(0, 17)),
        special_last=draw(st.booleans()),
        tail=draw(st.integers(0, 1)),
        anchor_frame=draw(st.none() | st.integers(0, frames - 1)),
    )


def query_mergings() -> st.SearchStrategy[QueryMerging]:
    return st.builds(
        QueryMerging,
        group=st.integers(1, 45),
        merge_anchor=st.booleans(),
        unmerge=st.sampled_from(sorted(UNMERGINGS)),
    )


def key_value_prunings(
    kinds: Iterable[type[KeyValuePruning]] | None = None,
) -> st.SearchStrategy[KeyValuePruning]:
    """Return operators of the kinds given, or of every registered kind."""
    return st.one_of(
        st.builds(
            kind,
            keep_special=st.booleans(),
            keep_anchor=st.booleans(),
            mass_correction=st.sampled_from([0.0, 0.5, 1.0]),
        )
        for kind in (KEY_VALUE_OPERATORS.values() if kinds is None else kinds)
    )


def operators() -> st.SearchStrategy[Operators]:
    return st.builds(Operators, query_mergings(), st.deferred(key_value_prunings))


def rules() -> st.SearchStrategy[ResolvedRule]:
    factors = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 25, 64])
    return st.builds(ResolvedRule, factors, factors, operators())
