from __future__ import annotations

import pandas as pd
import pytest
import torch
from faulty_runs import make_clip
from torch import nn

from calibrate.defaults import TRUSTED
from calibrate.measure.evaluator import run_dense
from calibrate.measure.probe import COLUMNS, SensitivityError, probe
from calibrate.measure.residual_drift import drift, fit_drift_to_probes, rank_agreement
from spark3r import LayerRule, Operators, Schedule, apply
from spark3r.reduction.operators import QueryMerging, TokenStride
from spark3r.runner import Runner
from spark3r.schedule import operators_text

PAPER = Operators(QueryMerging(group=2))
FAITHFUL = Operators(QueryMerging(group=2), TokenStride(keep_anchor=True, mass_correction=1.0))
CLIPS = [make_clip(6, name="a"), make_clip(6, step=0.2, name="b")]
FACTORS = {"query_factors": (2, 4), "key_value_factors": (2, 3)}


def test_the_table_is_like_that_of_the_probe(model: nn.Module) -> None:
    table = drift(Runner.of(model), CLIPS, [PAPER, FAITHFUL], **FACTORS)
    assert list(table.columns) == list(COLUMNS)
    assert set(table["metric"]) == {"drift"}
    assert len(table) == 2 * 2 * (3 + 3)
    assert (table.loc[table["factor"] == 1, "mean"] == 0).all()
    reduced = table[table["factor"] > 1]
    assert (reduced["mean"] > 0).all()
    assert (reduced["mean"] < 1).all()


def test_drift_is_the_change_of_the_residual_stream(model: nn.Module) -> None:
    """The oracle: the stream after the attention of layer 1, dense and with layer 1 reduced."""
    streams: list[torch.Tensor] = []
    block = model.aggregator.global_blocks[1]  # type: ignore[union-attr,index]
    hook = block.norm2.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    with torch.inference_mode():
        model(CLIPS[0].images)
        schedule = Schedule((LayerRule(), LayerRule(1, 3)), FAITHFUL)
        with apply(model, schedule):
            model(CLIPS[0].images)
    hook.remove()
    before, after = streams
    expected = float((after - before).norm() / before.norm())
    table = drift(Runner.of(model), CLIPS[:1], [FAITHFUL], key_value_factors=(3,))
    row = table[(table["layer"] == 1) & (table["factor"] == 3)].iloc[0]
    assert row["mean"] == pytest.approx(expected, rel=1e-4)


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    with torch.inference_mode():
        before = model(CLIPS[0].images)["depth"]
        drift(Runner.of(model), CLIPS, [PAPER], **FACTORS)
        assert torch.equal(model(CLIPS[0].images)["depth"], before)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_clip(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no clip"):
        drift(Runner.of(model), [], [PAPER], **FACTORS)


def test_a_drift_that_is_not_finite_names_layer_and_factor(model: nn.Module) -> None:
    with torch.no_grad():
        attn = model.aggregator.global_blocks[1].attn  # type: ignore[union-attr,index]
        attn.proj.bias[0] = float("nan")
    with pytest.raises(
        SensitivityError,
        match=r"layer 1 \(aggregator.*1.attn, clip 'a'\), query factor 2: drift is nan",
    ):
        drift(Runner.of(model), CLIPS, [PAPER], **FACTORS)


def table_of(values: dict[tuple[int, str, int], float], metric: str) -> pd.DataFrame:
    return pd.DataFrame(
        [
            dict(
                zip(
                    COLUMNS,
                    ("x", operators_text(PAPER), *place, metric, value, 0.1 * abs(value), 4),
                    strict=True,
                )
            )
            for place, value in values.items()
        ]
    )


DRIFTS = {
    (layer, axis, factor): 0.01 * (layer + 1) * (factor - 1)
    for layer in range(3)
    for axis in ("query", "key_value")
    for factor in (1, 2, 4, 8)
}


def test_a_few_probes_give_the_scale_of_drift() -> None:
    slope = {(0, "query"): 5.0, (1, "query"): 2.0}
    probes = {
        (layer, "query", factor): 0.3 + slope[layer, "query"] * DRIFTS[layer, "query", factor]
        for layer in (0, 1)
        for factor in (1, 4)
    }
    probes |= {(2, "key_value", 1): 0.3, (2, "key_value", 8): 0.3 - 0.5 * 0.21}
    scaled = fit_drift_to_probes(
        table_of(DRIFTS, "drift"), table_of(probes, "score.error"), "score.error"
    )
    means = {
        (layer, axis, factor): mean
        for layer, axis, factor, mean in zip(
            scaled["layer"], scaled["axis"], scaled["factor"], scaled["mean"], strict=True
        )
    }
    assert set(scaled["metric"]) == {"score.error"}
    # Half the slope is the layer's own, half that of the axis: least squares of all its probes.
    pooled = (5 * 0.03**2 + 2 * 0.06**2) / (0.03**2 + 0.06**2)
    assert means[0, "query", 8] == pytest.approx(0.3 + (5 + pooled) / 2 * 0.07)
    assert means[1, "query", 8] == pytest.approx(0.3 + (2 + pooled) / 2 * 0.14)
    # A layer without a probe takes that of the axis.
    assert means[2, "query", 2] == pytest.approx(0.3 + pooled * 0.03)
    assert means[0, "key_value", 4] == pytest.approx(0.3 - 0.5 * 0.03)
    assert (scaled["spread"] >= 0).all()
    only_queries = table_of({k: v for k, v in probes.items() if k[1] == "query"}, "score.error")
    with pytest.raises(SensitivityError, match="no probe says what drift on axis key_value does"):
        fit_drift_to_probes(table_of(DRIFTS, "drift"), only_queries, "score.error")


def test_slopes_are_those_of_the_clips_that_were_probed() -> None:
    probes = {(layer, axis, 4): 0.2 for layer in range(3) for axis in ("query", "key_value")}
    probes |= {(*place[:2], 1): 0.0 for place in probes}
    # What was probed drifts twice as much as the clips that all factors were measured on.
    beside = {place: 2 * DRIFTS[place] for place in probes}
    tables = [table_of(each, "drift") for each in (DRIFTS, beside)]
    own, others = (
        fit_drift_to_probes(tables[0], table_of(probes, "score.error"), "score.error", each)
        for each in (tables[1], None)
    )
    assert (own["mean"] * 2).to_numpy() == pytest.approx(others["mean"].to_numpy())
    assert others["mean"].max() > 0


def test_agreement_is_a_rank_correlation_per_axis() -> None:
    probes = {place: value**2 if place[1] == "query" else -value for place, value in DRIFTS.items()}
    agreement = rank_agreement(
        table_of(DRIFTS, "drift"), table_of(probes, "score.error"), "score.error"
    )
    assert agreement == pytest.approx({"query": 1.0, "key_value": -1.0})
    assert agreement["query"] >= TRUSTED
    few = table_of({(0, "query", 2): 1.0}, "score.error")
    assert rank_agreement(table_of(DRIFTS, "drift"), few, "score.error") == {}


def test_drift_and_probe_fit_together_on_a_real_model(model: nn.Module) -> None:
    dense = run_dense(Runner.of(model), CLIPS)
    probes = probe(Runner.of(model), dense, [PAPER], query_factors=(4,), key_value_factors=(3,))
    drifts = drift(Runner.of(model), CLIPS, [PAPER, FAITHFUL], **FACTORS)
    scaled = fit_drift_to_probes(drifts, probes, "score.deviation")
    assert len(scaled) == len(drifts)
    keys = ["operators", "layer", "axis", "factor"]
    both = scaled.merge(probes[probes["metric"] == "score.deviation"], on=keys)
    both = both.merge(drifts, on=keys)
    for _, rows in both[both["factor"] > 1].groupby("axis"):
        found, own, drifted = (rows[name].to_numpy() for name in ("mean_x", "mean_y", "mean"))
        slope = (own @ drifted) / (drifted @ drifted)
        assert found == pytest.approx((own + slope * drifted) / 2, rel=1e-6)
