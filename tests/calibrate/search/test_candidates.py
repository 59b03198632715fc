from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from calibrate.defaults import OFFERED, POWER
from calibrate.measure.probe import COLUMNS, SensitivityError, sensitive_layers
from calibrate.search.candidates import choices, degradations
from calibrate.search.knapsack import solve
from spark3r import LayerRule, Operators
from spark3r.latency import TERMS, LatencyModel
from spark3r.layout import TokenLayout
from spark3r.reduction.operators import QueryMerging, TokenStride
from spark3r.reduction.rule import ResolvedRule
from spark3r.schedule import operators_text

PAPER = Operators()
FAITHFUL = Operators(key_value=TokenStride(keep_anchor=True, mass_correction=1.0))
LAYOUT = TokenLayout(64, 4, 4, special=5, anchor_frame=0)
LATENCY = LatencyModel(64, 10.0, dict.fromkeys(TERMS, 1.0))
CLIPS = 9
FACTORS = ((1, 0.0), (4, 1.0), (16, 2.0))


def row(
    operators: Operators, layer: int, axis: str, factor: int, mean: float, spread: float = 0.0
) -> dict[str, Any]:
    place = (operators_text(operators), layer, axis, factor)
    values = ("probe", *place, "score.deviation", mean, spread, CLIPS)
    return dict(zip(COLUMNS, values, strict=True))


def made(base: float = 0.5) -> pd.DataFrame:
    """Layer 1 is ten times as sensitive, queries three times; FAITHFUL is half as harmful."""
    return pd.DataFrame(
        [
            row(each, layer, axis, factor, base + harm * weight * (10 if layer else 1) * kind)
            for each, kind in ((PAPER, 1.0), (FAITHFUL, 0.5))
            for layer in (0, 1)
            for axis, weight in (("query", 3.0), ("key_value", 1.0))
            for factor, harm in FACTORS
        ]
    )


def test_degradation_is_the_difference_from_factor_1() -> None:
    found = degradations(made(), PAPER)
    assert found[0, "key_value", 1] == 0
    assert found[0, "key_value", 16] == pytest.approx(2)
    assert found[1, "query", 4] == pytest.approx(30)
    assert degradations(made(), FAITHFUL)[1, "query", 4] == pytest.approx(15)


def one_layer(means: dict[int, float], spread: float) -> dict[int, float]:
    rows = [row(PAPER, 0, "key_value", factor, mean, spread) for factor, mean in means.items()]
    found = degradations(pd.DataFrame(rows), PAPER)
    return {factor: degradation for (_, _, factor), degradation in found.items()}


def test_a_larger_factor_never_has_less_degradation() -> None:
    found = one_layer({1: 0.0, 2: 0.1, 4: 0.5, 8: 0.3, 16: 0.9}, 0.1)
    assert found == pytest.approx({1: 0.0, 2: 0.1, 4: 0.4, 8: 0.4, 16: 0.9})


def test_choices_are_all_pairs_and_equal_ones_occur_once() -> None:
    layers = choices(made(), [PAPER, FAITHFUL], LATENCY, LAYOUT)
    offered = sum(factor <= 16 for factor in OFFERED)
    # Operators of keys and values tell nothing apart where these are left alone.
    assert [len(layer) for layer in layers] == [2 * offered**2 - offered] * 2
    assert len({choice.rule.resolve(PAPER) for choice in layers[0]}) == len(layers[0])
    by_rule = {choice.rule: choice for choice in layers[1]}
    both = by_rule[LayerRule(4, 16, FAITHFUL)]
    assert both.degradation == pytest.approx(15**POWER + 10**POWER)
    assert both.cost_ms == LATENCY.layer_ms(ResolvedRule(4, 16, FAITHFUL), LAYOUT)
    assert by_rule[LayerRule(1, 1, PAPER)].degradation == 0
    # Half-way between 4 and 16 by their logarithms, where 10 and 20 were measured.
    assert by_rule[LayerRule(1, 8, PAPER)].degradation == pytest.approx(15**POWER)


def test_another_unmerging_is_another_choice() -> None:
    moved = replace(PAPER, query=QueryMerging(unmerge="linear"))
    both = pd.concat([made(), made().replace(operators_text(FAITHFUL), operators_text(moved))])
    layers = choices(both.drop_duplicates(), [PAPER, moved], LATENCY, LAYOUT)
    offered = sum(factor <= 16 for factor in OFFERED)
    assert [len(layer) for layer in layers] == [2 * offered**2 - offered] * 2
    by_rule = {choice.rule: choice for choice in layers[0]}
    copied, moving = by_rule[LayerRule(4, 1, PAPER)], by_rule[LayerRule(4, 1, moved)]
    assert moving.degradation < copied.degradation
    assert LayerRule(1, 4, moved) not in by_rule  # nothing is merged: the same as copying


def test_choices_end_at_the_largest_measured_factor() -> None:
    table = made()
    layers = choices(table[table["factor"] <= 4], [PAPER], LATENCY, LAYOUT)
    assert {choice.rule.key_value for choice in layers[0]} == {1, 2, 3, 4}


def test_the_knapsack_spares_the_sensitive_layer() -> None:
    layers = choices(made(), [PAPER], LATENCY, LAYOUT)
    dense_ms = LATENCY.layer_ms(ResolvedRule(1, 1, PAPER), LAYOUT)
    thin_ms = LATENCY.layer_ms(ResolvedRule(1, 16, PAPER), LAYOUT)
    answer = solve(layers, dense_ms + thin_ms)
    assert answer is not None
    first, second = answer.schedule(layers, PAPER).layers
    assert second == LayerRule(1, 1)
    assert first == LayerRule(1, 16)


def test_an_axis_that_was_not_measured_stays_dense() -> None:
    table = made()
    layers = choices(table[table["axis"] == "query"], [PAPER], LATENCY, LAYOUT)
    assert {choice.rule.key_value for choice in layers[0]} == {1}
    assert {choice.rule.query for choice in layers[0]} == {each for each in OFFERED if each <= 16}


def test_incomplete_tables_are_refused() -> None:
    table = made()
    with pytest.raises(SensitivityError, match=r"no metric 'score.deviation'"):
        degradations(table.assign(metric="score.error"), PAPER)
    with pytest.raises(SensitivityError, match="for these operators"):
        degradations(table, Operators(QueryMerging(group=3)))
    with pytest.raises(SensitivityError, match="no row of factor 1"):
        degradations(table[table["factor"] > 1], PAPER)
    with pytest.raises(SensitivityError, match=r"have none of error.trajectory"):
        sensitive_layers(table)


def test_the_papers_rule() -> None:
    rows = [
        row(PAPER, layer, "key_value", factor, value)
        for layer, raised in ((0, 1.04), (1, 1.06), (2, 0.5), (3, 1.05))
        for factor, value in ((32, 1.0), (256, raised))
    ]
    table = pd.DataFrame(rows).assign(metric="error.trajectory")
    assert sensitive_layers(table) == (1,)
    assert sensitive_layers(table, ratio=1.0) == (0, 1, 3)
    rotation = table.assign(metric="error.trajectory_step_deg")
    rotation.loc[(rotation["layer"] == 2) & (rotation["factor"] == 256), "mean"] = 2.0
    assert sensitive_layers(pd.concat([table, rotation])) == (1, 2)
