from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest
import torch
from torch import nn

import spark3r
from benchmarks.stratified import stratified_schedules
from calibrate.measure.latency_model import LayerSample, PassSample, check_fit, fit
from calibrate.measure.timing import (
    TimedPass,
    fit_latency,
    layer_grid,
    time_layers,
    time_passes,
)
from spark3r import FamilyError, Operators, Schedule
from spark3r.latency import TERMS, LatencyModel, terms
from spark3r.layout import TokenLayout
from spark3r.memory import is_out_of_memory
from spark3r.reduction.operators import QueryMerging, TokenStride
from spark3r.reduction.rule import ResolvedRule, clamp
from spark3r.runner import Runner

LAYOUT = TokenLayout(40, 8, 8, special=5, anchor_frame=0)
PAPER = Operators()
FAITHFUL = Operators(
    QueryMerging(unmerge="linear"), TokenStride(keep_anchor=True, mass_correction=1.0)
)
QUERY_FACTORS, KEY_VALUE_FACTORS = (1, 2, 3, 4, 8), (1, 2, 4, 8, 16, 32)
DEPTH = 8
TRUTH = LatencyModel(
    40,
    300.0,
    {
        "attention": 12.0,
        "queries": 0.9,
        "keys": 6.0,
        "masked": 3.0,
        "gathered": 2.0,
        "merged": 1.5,
        "moved": 2.5,
        "matched": 8.0,
    },
)
ZEROS_MS = 8.0  # a layer alone that returns zeros
ALONE = 0.8  # a layer's own work takes so much less alone than inside the model


def layer_samples(noise: float, seed: int, outliers: int = 0) -> list[LayerSample]:
    rng = random.Random(seed)
    rules = [None, *layer_grid([PAPER, FAITHFUL], QUERY_FACTORS, KEY_VALUE_FACTORS)]
    samples = []
    for rule in rules:
        ms = ZEROS_MS
        if rule is not None:
            ms += ALONE * TRUTH.layer_ms(clamp(rule, LAYOUT), LAYOUT)
        samples.append(LayerSample(rule, ms * rng.lognormvariate(0, noise)))
    for index in rng.sample(range(1, len(samples)), outliers):
        samples[index] = LayerSample(samples[index].rule, samples[index].ms * 4)
    return samples


def pass_sample(name: str, schedule: Schedule, noise: float, rng: random.Random) -> PassSample:
    ms = TRUTH.predict_ms(schedule, LAYOUT) * rng.lognormvariate(0, noise)
    return PassSample(name, schedule.resolve_within(LAYOUT), ms)


def anchors(noise: float, seed: int, dense: bool = True) -> list[PassSample]:
    rng = random.Random(seed)
    passes = [PassSample("wall", (), TRUTH.wall_ms(LAYOUT) * rng.lognormvariate(0, noise))]
    if dense:
        passes.append(pass_sample("dense", Schedule.dense(DEPTH), noise, rng))
    for each in (PAPER, FAITHFUL):
        middle = Schedule.uniform(DEPTH, 3, 8, operators=each)
        passes.append(pass_sample("middle", middle, noise, rng))
    return passes


def unseen(noise: float, seed: int, count: int = 20) -> list[PassSample]:
    rng = random.Random(seed)
    schedules = stratified_schedules(
        count, DEPTH, [PAPER, FAITHFUL], QUERY_FACTORS, KEY_VALUE_FACTORS, TRUTH, LAYOUT, seed
    )
    return [pass_sample(str(i), each, noise, rng) for i, each in enumerate(schedules)]


def test_without_noise_the_fit_finds_the_constants() -> None:
    model = fit(layer_samples(0, 0), anchors(0, 0), LAYOUT)
    assert model.rest_ms == pytest.approx(TRUTH.rest_ms)
    assert model.term_ms == pytest.approx(dict(TRUTH.term_ms), rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_with_noise_the_fit_is_accurate_enough(seed: int) -> None:
    model = fit(layer_samples(0.05, seed), anchors(0.02, seed), LAYOUT)
    report = check_fit(model, unseen(0, seed), LAYOUT)
    assert report.median_error <= 0.05
    assert report.largest_error <= 0.12
    assert report.constant_median_error > 3 * report.median_error
    assert len(report.names) == 20
    assert "a constant:" in str(report)


@pytest.mark.parametrize("seed", range(5))
def test_single_disturbed_timings_hardly_change_the_fit(seed: int) -> None:
    model = fit(layer_samples(0.02, seed, outliers=3), anchors(0.01, seed), LAYOUT)
    assert check_fit(model, unseen(0, seed), LAYOUT).largest_error <= 0.12


@pytest.mark.parametrize("seed", range(5))
def test_dense_is_extrapolated_when_it_does_not_fit(seed: int) -> None:
    layers = [s for s in layer_samples(0.02, seed) if s.rule is None or not s.rule.is_dense]
    model = fit(layers, anchors(0.01, seed, dense=False), LAYOUT)
    dense = Schedule.dense(DEPTH)
    assert model.predict_ms(dense, LAYOUT) == pytest.approx(
        TRUTH.predict_ms(dense, LAYOUT), rel=0.1
    )


def test_more_work_is_never_predicted_to_take_less_time() -> None:
    model = fit(layer_samples(0.3, 7), anchors(0.3, 7), LAYOUT)
    assert min(model.term_ms.values()) >= 0
    for each in (PAPER, FAITHFUL):
        costs = [
            model.layer_ms(ResolvedRule(1, factor, each), LAYOUT) for factor in KEY_VALUE_FACTORS
        ]
        assert costs[1:] == sorted(costs[1:], reverse=True)


def test_with_the_wall_alone_a_layer_is_as_fast_as_alone() -> None:
    model = fit(layer_samples(0, 0), anchors(0, 0)[:1], LAYOUT)
    assert model.rest_ms == pytest.approx(TRUTH.rest_ms)
    assert model.term_ms["attention"] == pytest.approx(ALONE * TRUTH.term_ms["attention"], rel=1e-3)


def test_the_constants_survive_as_a_plain_table() -> None:
    stored = json.loads(json.dumps(TRUTH.to_dict()))
    assert all(isinstance(value, float) for value in stored.values())
    assert LatencyModel.from_dict(stored) == TRUTH
    with pytest.raises(ValueError, match="expected the constants"):
        LatencyModel.from_dict({"rest_ms": 1.0})
    for name, value in (("frames", 0.0), ("attention_ms", -1.0)):
        with pytest.raises(ValueError, match=f"latency model with {name} {value:g}"):
            LatencyModel.from_dict(stored | {name: value})


def test_at_another_length_the_rest_is_scaled_and_the_terms_are_counted_anew() -> None:
    longer = TokenLayout(80, 8, 8, special=5, anchor_frame=0)
    assert TRUTH.wall_ms(longer) == 2 * TRUTH.wall_ms(LAYOUT)
    dense = Schedule.dense(DEPTH)
    per_layer = (TRUTH.predict_ms(dense, longer) - TRUTH.wall_ms(longer)) / DEPTH
    tokens = longer.tokens
    assert per_layer == pytest.approx(12 * tokens**2 / 1e6 + 0.9 * tokens / 1e3 + 6 * tokens / 1e3)


def amounts(rule: ResolvedRule, layout: TokenLayout = LAYOUT) -> dict[str, float]:
    return dict(zip(TERMS, terms(rule, layout), strict=True))


def test_terms_count_realised_lengths() -> None:
    dense = amounts(ResolvedRule())
    n = LAYOUT.tokens
    assert dense == {
        "attention": n * n / 1e6,
        "queries": n / 1e3,
        "keys": n / 1e3,
        "masked": 0,
        "gathered": 0,
        "merged": 0,
        "moved": 0,
        "matched": 0,
    }
    stride = amounts(ResolvedRule(1, 8, PAPER))
    assert stride["keys"] == 5 * LAYOUT.tokens_per_frame / 1e3  # frames 0, 8, 16, 24, 32
    assert (stride["masked"], stride["gathered"]) == (0, 0)
    faithful = amounts(ResolvedRule(1, 8, FAITHFUL))
    assert faithful["keys"] == (5 * 5 + 64 + 39 * 8) / 1e3  # special tokens of five frames
    assert faithful["masked"] == faithful["attention"]
    assert faithful["gathered"] == faithful["keys"]
    merged = amounts(ResolvedRule(4, 1, PAPER))
    assert merged["queries"] == (40 * 5 + 40 * 16) / 1e3
    assert (merged["merged"], merged["moved"]) == (n / 1e3, 0)
    assert merged["matched"] == 2 * (20 * 16) * (20 * 48) / 1e6
    moved = amounts(ResolvedRule(4, 1, FAITHFUL))
    assert moved == merged | {"moved": n / 1e3}


@pytest.mark.parametrize(
    ("layers", "passes", "message"),
    [
        ([LayerSample(None, 1.0)], [], "needs the wall"),
        ([], [PassSample("wall", (), 1.0)], "needs the wall"),
        ([LayerSample(None, 0.0)], [PassSample("wall", (), 1.0)], "not a positive number"),
        ([LayerSample(None, 1.0)], [PassSample("wall", (), float("nan"))], "not a positive"),
    ],
)
def test_timings_that_cannot_be_fitted_are_refused(
    layers: Sequence[LayerSample], passes: Sequence[PassSample], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(layers, passes, LAYOUT)


def test_a_report_needs_passes() -> None:
    with pytest.raises(ValueError, match="no pass to check"):
        check_fit(TRUTH, [], LAYOUT)


@pytest.mark.slow
def test_a_real_model_is_timed_and_left_as_it_was(model: nn.Module) -> None:
    images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(images)["depth"]
    fitted = fit_latency(
        Runner.of(model),
        images,
        [PAPER, FAITHFUL],
        query_factors=(1, 2, 4),
        key_value_factors=(1, 2, 8),
        limit_s=0.5,
    )
    assert not spark3r.is_applied(model)
    with torch.inference_mode():
        assert torch.equal(model(images)["depth"], before)
    assert fitted.layout == TokenLayout(12, 4, 4, special=5, anchor_frame=0)
    assert fitted.model.frames == 12
    assert {rule for rule, _ in fitted.layers} >= {None, ResolvedRule(1, 1, PAPER)}
    assert {"wall", "dense", "queries alone"} < fitted.passes.keys()
    assert min(each.n for each in fitted.passes.values()) >= 2
    assert fitted.model.predict_ms(Schedule.uniform(2, 2, 4), fitted.layout) > 0


def test_a_dense_pass_that_does_not_fit_is_left_out_and_extrapolated(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = type(model.aggregator.global_blocks[0].attn)  # type: ignore[union-attr,index]
    whole = attention.forward

    def small_only(self: nn.Module, x: torch.Tensor, rope: object) -> torch.Tensor:
        if x.shape[0] == 1:  # global attention, dense
            raise RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory")
        result: torch.Tensor = whole(self, x, rope)  # type: ignore[arg-type]
        return result

    monkeypatch.setattr(attention, "forward", small_only)
    fitted = fit_latency(
        Runner.of(model),
        torch.rand(8, 3, 16, 16),
        [PAPER],
        query_factors=(1, 2),
        key_value_factors=(1, 2, 4),
        limit_s=0.2,
    )
    assert "dense" not in fitted.passes
    assert fitted.model.predict_ms(Schedule.dense(2), fitted.layout) > 0
    assert all(rule is None or not rule.is_dense for rule, _ in fitted.layers)


def test_other_errors_than_out_of_memory_are_raised(model: nn.Module) -> None:
    def fails(module: nn.Module, args: object) -> None:
        raise RuntimeError("something else")

    model.aggregator.frame_blocks[1].register_forward_pre_hook(fails)  # type: ignore[union-attr,index]
    with pytest.raises(RuntimeError, match="something else"):
        time_passes(Runner.of(model), [TimedPass("dense", "dense", torch.rand(2, 3, 16, 16))])


def test_layers_that_differ_cannot_stand_for_one_another(model: nn.Module) -> None:
    attn = model.aggregator.global_blocks[1].attn  # type: ignore[union-attr,index]
    attn.proj = nn.Linear(128, 128, bias=False)
    with pytest.raises(FamilyError, match="differ in class or size"):
        time_layers(Runner.of(model), torch.rand(2, 3, 16, 16), [ResolvedRule(1, 2, PAPER)])


def test_errors_that_count_as_out_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 12 bytes"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_corrected_model_is_right_about_the_wall_and_one_schedule() -> None:
    schedule, other = Schedule.uniform(4, 1, 4), Schedule.uniform(4, 2, 8)
    predicted = TRUTH.predict_ms(schedule, LAYOUT)
    corrected = TRUTH.corrected(LAYOUT, 1.1 * TRUTH.wall_ms(LAYOUT), predicted, 1.3 * predicted)
    assert corrected.wall_ms(LAYOUT) == pytest.approx(1.1 * TRUTH.wall_ms(LAYOUT))
    assert corrected.predict_ms(schedule, LAYOUT) == pytest.approx(1.3 * predicted)
    work = TRUTH.predict_ms(other, LAYOUT) - TRUTH.wall_ms(LAYOUT)
    gain = (1.3 * predicted - 1.1 * TRUTH.wall_ms(LAYOUT)) / (predicted - TRUTH.wall_ms(LAYOUT))
    assert corrected.predict_ms(other, LAYOUT) == pytest.approx(
        1.1 * TRUTH.wall_ms(LAYOUT) + gain * work
    )
    assert TRUTH.scaled(2.0).predict_ms(other, LAYOUT) == pytest.approx(
        2 * TRUTH.predict_ms(other, LAYOUT)
    )
    # A schedule that takes no more than the wall shows nothing of the terms.
    unmoved = TRUTH.corrected(LAYOUT, TRUTH.wall_ms(LAYOUT), TRUTH.wall_ms(LAYOUT), 5.0)
    assert unmoved.term_ms == TRUTH.term_ms
