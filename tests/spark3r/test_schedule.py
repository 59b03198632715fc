"""Layer rules, length rule and the paper's schedule."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import operators

from spark3r import LayerRule, LengthRule, Operators, Schedule, ScheduleError, paper_schedule
from spark3r.errors import LayoutError
from spark3r.layout import TokenLayout
from spark3r.reduction.operators import QueryMerging, TemporalStride, TokenStride
from spark3r.reduction.rule import ResolvedRule
from spark3r.schedule import PAPER_SENSITIVE_LAYERS, operators_text


@pytest.mark.parametrize(
    ("frames", "query", "sensitive", "other"),
    [
        (8, 1, 1, 3),
        (100, 1, 1, 3),
        (101, 2, 3, 9),
        (300, 2, 8, 24),
        (301, 3, 8, 24),
        (500, 3, 13, 39),
        (501, 4, 13, 39),
        (1000, 4, 25, 75),
    ],
)
def test_paper_schedule_of_vggt_by_hand(frames, query, sensitive, other):
    rules = paper_schedule("vggt").resolve(frames)
    assert len(rules) == 24
    for index, rule in enumerate(rules):
        expected = sensitive if 11 <= index <= 16 else other
        assert (rule.query, rule.key_value) == (query, expected)
        assert rule.operators == Operators()


def test_clips_too_short_to_gain_run_dense_under_the_papers_schedule():
    assert paper_schedule("vggt").resolve(7) == Schedule.dense(24).resolve(7)


@given(st.integers(101, 5000))
def test_the_paper_keeps_about_forty_frames(frames):
    factor = paper_schedule("pi3").resolve(frames)[12].key_value
    assert math.ceil(frames / factor) <= 40
    assert math.ceil(frames / max(1, factor - 1)) >= 40


@pytest.mark.parametrize(
    ("family", "layers", "sensitive"),
    [
        ("vggt", 24, {11, 12, 13, 14, 15, 16}),
        ("pi3", 18, {11, 12, 13, 14, 15, 16}),
        ("da3", 14, set(range(3, 13))),
        ("omega", 19, {7, 8, 9, 10, 11, 12, 13, 16}),
    ],
)
def test_sensitive_layers_of_the_paper(family, layers, sensitive):
    assert set(PAPER_SENSITIVE_LAYERS[family, layers]) == sensitive
    multipliers = [rule.key_value for rule in paper_schedule(family).layers]
    assert [index for index, m in enumerate(multipliers) if m == 1] == sorted(sensitive)
    assert set(multipliers) == {1, 3}


def test_omega_block_numbers_of_the_paper_become_global_layer_numbers():
    registers = {2, 6, 9, 14, 20}
    global_blocks = [block for block in range(24) if block not in registers]
    named = {10, 11, 12, 13, 15, 16, 17, 21}
    assert {global_blocks.index(block) for block in named} == set(
        PAPER_SENSITIVE_LAYERS["omega", 19]
    )


def test_uncovered_models_need_their_sensitive_layers():
    with pytest.raises(ScheduleError, match="no sensitive layers for 'da3' with 8 global layers"):
        paper_schedule("da3", 8)
    with pytest.raises(ScheduleError, match="no model of family 'reference'"):
        paper_schedule("reference")
    with pytest.raises(ScheduleError, match=r"sensitive layers \[8, 9\] lie outside the 8"):
        paper_schedule("reference", 8, sensitive=[1, 8, 9])
    rules = paper_schedule("reference", 8, sensitive=[1, 2]).resolve(200)
    assert [rule.key_value for rule in rules] == [15, 5, 5, 15, 15, 15, 15, 15]


@given(st.integers(1, 64), st.integers(1, 2000), st.integers(1, 500))
def test_constant_kept_frames_keeps_as_many_frames(factor, frames, calibrated):
    length = LengthRule("constant_kept_frames", calibrated_frames=calibrated)
    (rule,) = Schedule.uniform(1, 2, factor, length=length).resolve(frames)
    assert rule.query == 2
    exact = factor * frames / calibrated
    assert abs(rule.key_value - max(1, exact)) <= 0.5
    assert Schedule.uniform(1, 2, factor, length=length).resolve(calibrated)[0].key_value == factor


def test_constant_mode_and_min_frames():
    schedule = Schedule.uniform(3, 2, 5, length=LengthRule(min_frames=10))
    assert [r.is_dense for r in schedule.resolve(9)] == [True] * 3
    assert {(r.query, r.key_value) for r in schedule.resolve(10)} == {(2, 5)}
    assert {(r.query, r.key_value) for r in schedule.resolve(10_000)} == {(2, 5)}
    assert all(rule.is_dense for rule in Schedule.dense(4).layers)


def test_a_layers_own_operators_win():
    own = Operators(key_value=TokenStride())
    common = Operators(QueryMerging(group=7))
    schedule = Schedule((LayerRule(2, 2), LayerRule(2, 2, own)), common)
    assert [rule.operators for rule in schedule.resolve(5)] == [common, own]


@pytest.mark.parametrize("bad", [0, -1, 1.0, 2.5, True, "2", None])
def test_factors_are_integers_of_at_least_one(bad):
    with pytest.raises(ScheduleError, match=r"query factor is .*, expected an integer of at least"):
        LayerRule(query=bad)
    with pytest.raises(ScheduleError, match="key-value factor is"):
        LayerRule(key_value=bad)
    with pytest.raises(ScheduleError, match="number of frames is"):
        Schedule.dense(1).resolve(bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Operators("intra_group"), r"query is 'intra_group', expected QueryMerging\("),
        (
            lambda: Operators(QueryMerging(unmerge="mean")),
            "unmerge is 'mean', expected one of: copy, linear",
        ),
        (
            lambda: Operators(key_value="token_stride"),
            r"key_value is 'token_stride', expected one of: TemporalStride\(...\), TokenStride\(",
        ),
        (
            lambda: Operators.from_dict({**Operators().to_dict(), "key_value": {"name": "random"}}),
            "key-value operator is 'random', expected one of: temporal_stride, token_stride",
        ),
        (
            lambda: Operators.from_dict(
                {**Operators().to_dict(), "query": {"name": "intra_group", "window": 3}}
            ),
            "query operator 'intra_group' has no field 'window', expected only: group, merge_anch",
        ),
        (lambda: Operators(QueryMerging(group=0)), "group is 0, expected an integer of at least 1"),
        (
            lambda: Operators(key_value=TemporalStride(mass_correction=1.5)),
            "mass_correction is 1.5, expected a number from",
        ),
        (
            lambda: Operators(key_value=TemporalStride(mass_correction=math.nan)),
            "mass_correction is nan",
        ),
        (
            lambda: Operators(key_value=TemporalStride(keep_anchor=1)),
            "keep_anchor is 1, expected true or false",
        ),
        (lambda: LengthRule("linear"), "length mode is 'linear'"),
        (lambda: LengthRule("constant_kept_frames"), "needs calibrated_frames"),
        (lambda: LengthRule(min_frames=9, max_frames=8), "max_frames is 8, expected .* least 9"),
        (lambda: Schedule(()), "at least one layer rule"),
        (lambda: Schedule(((1, 2),)), r"layers\[0\] is \(1, 2\), expected a LayerRule"),
        (lambda: Schedule.uniform(0), "number of layers is 0"),
        (lambda: Schedule(5), "layers are 5, expected one LayerRule per layer"),
        (lambda: Schedule.uniform(2, operators="token_stride"), "expected Operators"),
        (lambda: Schedule.uniform(2, length="paper"), r"length is 'paper', expected LengthRule"),
        (lambda: LayerRule(1, 2, {"group": 3}), "expected Operators or None"),
        (lambda: paper_schedule("x", 4, sensitive=2), "sensitive is 2, expected layer numbers"),
        (lambda: paper_schedule("x", 4, sensitive=[1.5]), "sensitive layer is 1.5, expected an"),
    ],
)
def test_nonsense_is_refused_with_what_was_expected(make, message):
    with pytest.raises(ScheduleError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 0}, "at least one frame and one patch, got 0 frames"),
        ({"width": 0}, "of 2x0 patches"),
        ({"special": -1}, "cannot be negative, got -1 special"),
        ({"anchor_frame": 3}, "anchor frame 3 lies outside the clip's 3 frames"),
    ],
)
def test_layouts_that_cannot_be(arguments, message):
    with pytest.raises(LayoutError, match=message):
        TokenLayout(**({"frames": 3, "height": 2, "width": 2} | arguments))


def test_layout_counts():
    layout = TokenLayout(3, 4, 5, special=2, special_last=True, tail=1)
    assert (layout.patches, layout.tokens_per_frame, layout.tokens) == (20, 22, 67)
    assert layout.patch_start == 0
    assert TokenLayout(3, 4, 5, special=2).patch_start == 2


def test_numpy_integers_are_integers():
    rule = LayerRule(np.int64(4), np.int32(2))
    assert rule == LayerRule(4, 2)
    assert type(rule.query) is int
    assert Schedule.dense(2).resolve(np.int64(7)) == Schedule.dense(2).resolve(7)


def test_operators_of_an_axis_that_is_left_alone_make_no_difference() -> None:
    paper, thin = Operators(), Operators(key_value=TokenStride(keep_anchor=True))
    groups = Operators(QueryMerging(group=4))
    assert ResolvedRule(4, 1, thin) == ResolvedRule(4, 1, paper)
    assert ResolvedRule(4, 2, thin) != ResolvedRule(4, 2, paper)
    assert LayerRule(1, 2).resolve(thin) == LayerRule(1, 2, thin).resolve(paper)
    assert ResolvedRule(1, 2, groups) == ResolvedRule(1, 2, paper)
    assert ResolvedRule(2, 1, groups) != ResolvedRule(2, 1, paper)
    assert ResolvedRule(1, 1, thin) == ResolvedRule() == ResolvedRule(1, 1, groups)


def test_operators_are_described_and_told_apart() -> None:
    faithful = Operators(
        QueryMerging(group=4, merge_anchor=False, unmerge="linear"),
        TokenStride(keep_special=True, keep_anchor=True, mass_correction=0.5),
    )
    assert Operators().describe() == "temporal stride"
    assert faithful.describe() == "token stride + special tokens + anchor, β 0.5, linear"
    assert ResolvedRule(2, 2, faithful).describe() == (
        "token stride + special tokens + anchor, β 0.5; "
        "queries merged in groups of 4, anchor frame left alone, linear unmerging"
    )
    assert ResolvedRule(2).describe() == "queries merged, copied back"
    assert ResolvedRule().describe() == "–"


@given(operators())
def test_operators_are_read_as_they_were_written(each) -> None:
    assert Operators.from_dict(json.loads(operators_text(each))) == each


def test_numbers_of_operators_are_plain_ones() -> None:
    counted = Operators(QueryMerging(group=np.int64(4)), TokenStride(mass_correction=1))
    assert operators_text(counted) == operators_text(
        Operators(QueryMerging(group=4), TokenStride(mass_correction=1.0))
    )


def test_operators_that_could_not_be_read_again_are_not_written() -> None:
    class Unregistered(TokenStride):
        """Keeps what its parent keeps."""

    with pytest.raises(ScheduleError, match="Unregistered is not registered as 'token_stride'"):
        Operators(key_value=Unregistered()).to_dict()
