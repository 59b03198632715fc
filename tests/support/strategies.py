"""Hypothesis strategies for layouts and rules."""

from __future__ import annotations

from hypothesis import strategies as st

from spark3r.layout import TokenLayout
from spark3r.schedule import LayerRule, Operators


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


def operators() -> st.SearchStrategy[Operators]:
    return st.builds(
        Operators,
        group=st.integers(1, 45),
        merge_anchor=st.booleans(),
        unmerge=st.sampled_from(["copy", "linear"]),
        key_value=st.sampled_from(["temporal_stride", "token_stride"]),
        keep_special=st.booleans(),
        keep_anchor=st.booleans(),
        mass_correction=st.sampled_from([0.0, 0.5, 1.0]),
    )


def rules() -> st.SearchStrategy[LayerRule]:
    factors = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 25, 64])
    return st.builds(LayerRule, factors, factors, operators())
