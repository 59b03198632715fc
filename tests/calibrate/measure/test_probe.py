from __future__ import annotations

import pandas as pd
import pytest
import torch
from faulty_runs import make_clip
from tiny_job import applied_schedule
from torch import nn

import spark3r
from calibrate.measure.evaluator import DenseRuns, evaluate, run_dense
from calibrate.measure.probe import COLUMNS, SensitivityError, probe
from spark3r import LayerRule, Operators, Schedule
from spark3r.reduction.operators import QueryMerging, TokenStride
from spark3r.runner import Runner
from spark3r.schedule import operators_text

PAPER = Operators(QueryMerging(group=2))
FAITHFUL = Operators(QueryMerging(group=2), TokenStride(keep_anchor=True, mass_correction=1.0))
CLIPS = [make_clip(6, name="a"), make_clip(6, step=0.2, name="b")]


@pytest.fixture
def dense(model: nn.Module) -> DenseRuns:
    return run_dense(Runner.of(model), CLIPS)


def pick(table: pd.DataFrame, **where: object) -> pd.Series:
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


def test_dense_runs_have_no_deviation_and_different_names(model: nn.Module) -> None:
    runs = run_dense(Runner.of(model), CLIPS)
    assert [quality.clip for quality in runs.qualities] == ["a", "b"]
    assert all(quality.deviation.depth_log == 0 for quality in runs.qualities)
    with pytest.raises(ValueError, match="different names"):
        run_dense(Runner.of(model), [CLIPS[0], CLIPS[0]])


def test_an_evaluation_leaves_the_model_unpatched(model: nn.Module, dense: DenseRuns) -> None:
    qualities = evaluate(Runner.of(model), Schedule.uniform(2, 1, 3, operators=PAPER), dense)
    assert not spark3r.is_applied(model)
    assert all(quality.deviation.depth_log > 0 for quality in qualities)
    assert all(quality.error is not None for quality in qualities)
    with_clouds = evaluate(Runner.of(model), Schedule.dense(2), dense, clouds=True)
    assert "deviation.accuracy" in with_clouds[0].figures()


def test_the_table_has_every_layer_axis_factor_and_metric(
    model: nn.Module, dense: DenseRuns
) -> None:
    steps: list[tuple[int, int]] = []
    table = probe(
        Runner.of(model),
        dense,
        [PAPER, FAITHFUL],
        query_factors=(1, 2),
        key_value_factors=(2, 3),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert list(table.columns) == list(COLUMNS)
    assert not table.isna().any().any()
    assert steps == [(number, 12) for number in range(13)]
    for operators in (PAPER, FAITHFUL):
        part = table[
            (table["operators"] == operators_text(operators))
            & (table["metric"] == "score.deviation")
        ]
        rows = set(zip(part["layer"], part["axis"], part["factor"], strict=True))
        assert rows == {
            (layer, axis, factor)
            for layer in (0, 1)
            for axis, factors in (("query", (1, 2)), ("key_value", (1, 2, 3)))
            for factor in factors
        }
        assert len(part) == len(rows)
    assert {"error.rotation_deg", "consistency.log_ratio", "score.error"} <= set(table["metric"])
    assert set(table["clips"]) == {2}


def test_a_row_is_what_an_evaluation_of_that_schedule_gives(
    model: nn.Module, dense: DenseRuns
) -> None:
    table = probe(
        Runner.of(model),
        dense,
        [PAPER],
        query_factors=(2,),
        key_value_factors=(3,),
        operating_point=(1, 2),
        layers=[1],
    )
    schedule = Schedule((LayerRule(1, 2), LayerRule(1, 3)), PAPER)
    values = [q.deviation.depth_log for q in evaluate(Runner.of(model), schedule, dense)]
    base = Schedule.uniform(2, 1, 2, operators=PAPER)
    before = [q.deviation.depth_log for q in evaluate(Runner.of(model), base, dense)]
    row = pick(table, axis="key_value", factor=3, metric="deviation.depth_log")
    assert row["mean"] == pytest.approx(sum(values) / 2)
    changes = [value - old for value, old in zip(values, before, strict=True)]
    assert row["spread"] == pytest.approx(abs(changes[0] - changes[1]) / 2**0.5)
    at_point = pick(table, axis="query", factor=1, metric="deviation.depth_log")
    assert at_point["mean"] == pytest.approx(sum(before) / 2)
    assert at_point["spread"] == 0
    assert set(table["layer"]) == {1}


def test_operators_of_an_axis_that_is_not_reduced_are_not_run_again(
    model: nn.Module, dense: DenseRuns
) -> None:
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    with model.register_forward_pre_hook(count):
        probe(
            Runner.of(model), dense, [PAPER, FAITHFUL], query_factors=(2,), key_value_factors=(2,)
        )
    schedules = 2 + 2 * 2  # queries merge alike under both; dense is known
    assert runs == 1 + schedules * len(dense.clips)  # the first finds the token layout


def test_factors_beyond_the_clip_are_brought_down(model: nn.Module, dense: DenseRuns) -> None:
    table = probe(Runner.of(model), dense, [PAPER], key_value_factors=(5, 32, 256))
    assert sorted(table["factor"].unique()) == [1, 5, 6]


def test_a_model_that_returns_nan_is_named_with_layer_and_factor(
    model: nn.Module, dense: DenseRuns
) -> None:
    spoiled = model.aggregator.global_blocks[1].attn  # type: ignore[union-attr,index]

    def spoil(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> object:
        schedule = applied_schedule(model)
        is_spoiled = schedule is not None and schedule.layers[1].key_value == 3
        return output * float("nan") if is_spoiled else output

    spoiled.register_forward_hook(spoil)
    with pytest.raises(
        SensitivityError,
        match=r"^layer 1 \(aggregator.global_blocks.1.attn\), key_value factor 3: .*NaN",
    ):
        probe(Runner.of(model), dense, [PAPER], key_value_factors=(2, 3))
    assert not spark3r.is_applied(model)
