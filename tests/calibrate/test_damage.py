from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from calibrate.damage import choices, damages, sensitive_layers
from calibrate.knapsack import solve
from calibrate.latency import TERMS, LatencyModel
from calibrate.naming import operators_text
from calibrate.sensitivity import COLUMNS, SensitivityError
from spark3r import LayerRule, Operators
from spark3r.layout import TokenLayout

PAPER = Operators()
FAITHFUL = Operators(key_value="token_stride", keep_anchor=True, mass_correction=1.0)
LAYOUT = TokenLayout(64, 4, 4, special=5, anchor_frame=0)
LATENCY = LatencyModel(64, 10.0, dict.fromkeys(TERMS, 1.0))
CLIPS = 9
FACTORS = ((1, 0.0), (4, 1.0), (16, 2.0))


def row(
    operators: Operators, layer: int, axis: str, factor: int, mean: float, spread: float = 0.0
) -> dict[str, Any]:
    place = (operators_text(operators), layer, axis, factor)
    values = ("probe", *place, "score.error", mean, spread, CLIPS)
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


def test_damage_is_the_difference_from_factor_1() -> None:
    found = damages(made(), "score.error", PAPER)
    assert found[0, "key_value", 1] == 0
    assert found[0, "key_value", 16] == pytest.approx(2)
    assert found[1, "query", 4] == pytest.approx(30)
    assert damages(made(), "score.error", FAITHFUL)[1, "query", 4] == pytest.approx(15)


def with_deviation(changes: list[float], deviations: list[float], spread: float) -> pd.DataFrame:
    """One factor of each of several layers."""
    rows = []
    for layer, (change, deviation) in enumerate(zip(changes, deviations, strict=True)):
        for factor, size in ((1, 0.0), (4, 1.0)):
            error = row(PAPER, layer, "query", factor, size * change, size * spread)
            faithful = row(PAPER, layer, "query", factor, size * deviation)
            rows += [error, faithful | {"metric": "score.deviation"}]
    return pd.DataFrame(rows)


def believed_of(table: pd.DataFrame) -> list[float]:
    found = damages(table, "score.error", PAPER)
    return [damage for (_, _, factor), damage in found.items() if factor > 1]


def test_damage_is_shrunk_towards_what_deviation_lets_expect() -> None:
    changes, deviations, spread = [0.1, 0.2, 0.9, 0.4], [0.1, 0.2, 0.3, 0.4], 0.3
    d, v, e2 = np.array(changes), np.array(deviations), (spread / 3) ** 2  # nine clips
    k = float(d @ v / (v @ v))
    s2 = float(np.mean((d - k * v) ** 2) - e2)
    assert s2 > 0
    wanted = k * v + (d - k * v) * s2 / (s2 + e2)
    assert believed_of(with_deviation(changes, deviations, spread)) == pytest.approx(list(wanted))
    # Without noise nothing is shrunk; with nothing but noise only the rule is left.
    assert believed_of(with_deviation(changes, deviations, 0.0)) == pytest.approx(changes)
    only_rule = believed_of(with_deviation(changes, deviations, 30.0))
    assert only_rule == pytest.approx(list(k * v))


def test_gains_count_only_where_they_are_significant() -> None:
    # Nine clips, spread 0.3: the standard error is 0.1, the one-sided 95 % t quantile 1.86.
    deviations = [0.2, 0.1, 0.1]
    lucky = believed_of(with_deviation([0.5, -0.15, -0.1], deviations, 0.3))
    assert all(damage > 0 for damage in lucky)
    real = believed_of(with_deviation([0.5, -0.9, -0.1], deviations, 0.3))
    assert -0.9 < real[1] < -0.5
    alone = with_deviation([0.5, -0.9, -0.1], deviations, 0.3).assign(clips=1)
    assert believed_of(alone)[1] >= 0  # one clip says nothing


def test_where_error_says_nothing_the_more_faithful_is_preferred() -> None:
    first, second = believed_of(with_deviation([-0.01, -0.02], [0.1, 0.4], 0.3))
    assert 0 < first < second


def test_factors_at_which_only_deviation_is_known_follow_its_rule() -> None:
    table = with_deviation([0.2, 0.4], [0.1, 0.2], 0.0)
    more = [
        row(PAPER, layer, "query", 8, deviation) | {"metric": "score.deviation"}
        for layer, deviation in ((0, 0.3), (1, 0.5))
    ]
    found = damages(pd.concat([table, pd.DataFrame(more)]), "score.error", PAPER)
    assert found[0, "query", 4] == pytest.approx(0.2)
    assert found[0, "query", 8] == pytest.approx(0.6)
    assert found[1, "query", 8] == pytest.approx(1.0)


def one_layer(means: dict[int, float], spread: float) -> dict[int, float]:
    rows = [row(PAPER, 0, "key_value", factor, mean, spread) for factor, mean in means.items()]
    table = pd.DataFrame(rows).assign(metric="score.deviation")
    found = damages(table, "score.deviation", PAPER)
    return {factor: damage for (_, _, factor), damage in found.items()}


def test_a_larger_factor_of_a_layer_does_no_less_harm() -> None:
    found = one_layer({1: 0.0, 2: 0.1, 4: 0.5, 8: 0.3, 16: 0.9}, 0.1)
    assert found == pytest.approx({1: 0.0, 2: 0.1, 4: 0.4, 8: 0.4, 16: 0.9})


def test_choices_are_all_pairs_with_dense_once() -> None:
    layers = choices(made(), "score.error", [PAPER, FAITHFUL], LATENCY, LAYOUT)
    assert [len(layer) for layer in layers] == [2 * 9 - 1, 2 * 9 - 1]
    by_rule = {choice.rule: choice for choice in layers[1]}
    both = by_rule[LayerRule(4, 16, FAITHFUL)]
    assert both.damage == pytest.approx(15 + 10)
    assert both.cost_ms == LATENCY.layer_ms(LayerRule(4, 16, FAITHFUL), LAYOUT)
    assert by_rule[LayerRule(1, 1, PAPER)].damage == 0


def test_the_knapsack_spares_the_sensitive_layer() -> None:
    layers = choices(made(), "score.error", [PAPER], LATENCY, LAYOUT)
    dense_ms = LATENCY.layer_ms(LayerRule(1, 1, PAPER), LAYOUT)
    thin_ms = LATENCY.layer_ms(LayerRule(1, 16, PAPER), LAYOUT)
    answer = solve(layers, dense_ms + thin_ms)
    assert answer is not None
    first, second = answer.schedule(layers, PAPER).layers
    assert second == LayerRule(1, 1)
    assert first == LayerRule(1, 16)


def test_an_axis_that_was_not_measured_stays_dense() -> None:
    table = made()
    layers = choices(table[table["axis"] == "query"], "score.error", [PAPER], LATENCY, LAYOUT)
    assert {choice.rule.key_value for choice in layers[0]} == {1}
    assert len(layers[0]) == 3


def test_tables_without_what_is_asked_for_are_refused() -> None:
    with pytest.raises(SensitivityError, match=r"no metric 'score.depth'"):
        damages(made(), "score.depth", PAPER)
    with pytest.raises(SensitivityError, match=r"no metric 'score.error' for these operators"):
        damages(made(), "score.error", Operators(group=3))
    table = made()
    with pytest.raises(SensitivityError, match="around another point than dense"):
        damages(table[table["factor"] > 1], "score.error", PAPER)
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
