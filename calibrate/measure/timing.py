"""Timing of a live model: its global attention layers alone, and whole passes.

Layers are timed through the family's own ``reduced_forward`` on the hidden states of a real pass at
the target length. All global layers of a model have the same size, so only the first one is timed.

The last functions judge timings: how noisy they are, how much slower the machine has become, and
what to conclude from a prediction and a timing that differ.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from spark3r.errors import FamilyError
from spark3r.latency import LatencyModel
from spark3r.layout import TokenLayout
from spark3r.patching.apply import apply, remove
from spark3r.patching.wall import apply_wall, wall_forward
from spark3r.reduction.operators import Operators
from spark3r.reduction.rule import ResolvedRule, clamp
from spark3r.runner import Runner, autocast, evaluation_mode
from spark3r.schedule import LayerRule, Schedule
from spark3r.timing import Latency, Timer, Treatment

from ..defaults import PREDICTION_ERROR, TIMED_KEY_VALUE_FACTORS, TIMED_QUERY_FACTORS
from ..progress import Progress, Reporter, no_progress
from .latency_model import FitReport, LayerSample, PassSample, check_fit, fit

Pass = Schedule | Literal["dense", "wall"]
"""A whole pass of the model: under a schedule, dense, or at the wall."""


@dataclass(frozen=True)
class PassTiming:
    """The subject of timing a whole pass, for a timer that looks latencies up.

    Attributes:
        what: The pass.
        layout: Token layout of the clip.
    """

    what: Pass
    layout: TokenLayout


@dataclass(frozen=True)
class LayerTiming:
    """The subject of timing a global attention layer alone, for a timer that looks latencies up.

    Attributes:
        rule: Resolved rule of the layer; None for the layer that returns zeros.
        layout: Token layout of the clip.
    """

    rule: ResolvedRule | None
    layout: TokenLayout


@dataclass(frozen=True)
class LatencyTable:
    """Timings at one length, and the latency model that was fitted to them.

    Attributes:
        layout: Token layout of the timed clips.
        layers: Resolved rule and latency of layers alone; None for the layer that returns zeros.
        passes: Latencies of whole passes by name, with ``dense`` and ``wall`` if they fit.
        model: The latency model.
        report: Its errors on other passes, None for the model of an earlier profile.
        largest_error: Its largest relative error.
        dense_ms: Dense latency per clip.
        dense_extrapolated: True if dense latency was extrapolated because dense does not fit.
        wall_ms: The wall per clip.
    """

    layout: TokenLayout
    layers: tuple[tuple[ResolvedRule | None, Latency], ...]
    passes: Mapping[str, Latency]
    model: LatencyModel
    report: FitReport | None
    largest_error: float
    dense_ms: float
    dense_extrapolated: bool
    wall_ms: float


def measure_latency(
    runner: Runner,
    images: Tensor,
    operators: Sequence[Operators],
    *,
    timer: Timer = Timer(),
    query_factors: Sequence[int] = TIMED_QUERY_FACTORS,
    key_value_factors: Sequence[int] = TIMED_KEY_VALUE_FACTORS,
    limit_s: float | None = None,
    reporter: Reporter = Reporter(),
) -> LatencyTable:
    """Time a model at the target length and fit its latency model.

    Args:
        runner: An unpatched model. It is unpatched again afterwards.
        images: A clip of the target length, ``[S, 3, H, W]``.
        operators: Operators that schedules may use. Each of them is timed.
        timer: Takes the latencies.
        query_factors: Query factors of the timed layers.
        key_value_factors: Key-value factors of the timed layers.
        limit_s: Approximate seconds for the layers, and again for the passes; None for no limit.
        reporter: Receives the progress.

    Raises:
        FamilyError: If the global attention layers are not alike, or the wall does not fit.
    """
    layout, depth = runner.layout(images), runner.depth
    rules = layer_grid(operators, query_factors, key_value_factors)
    step = reporter.step("latency of layers")
    layers = time_layers(runner, images, rules, timer=timer, limit_s=limit_s, progress=step)
    fitted, checked = passes_to_time(depth, operators, query_factors, key_value_factors)
    to_time = fitted | checked
    step = reporter.step("latency of passes")
    passes = time_passes(runner, images, to_time, timer=timer, limit_s=limit_s, progress=step)
    if "wall" not in passes:
        raise FamilyError(
            f"a clip of {layout.frames} frames does not fit even without global attention: choose "
            "a shorter target length"
        )
    samples = {
        name: PassSample(name, resolved_rules(to_time[name], depth, layout), latency.median_ms)
        for name, latency in passes.items()
    }
    latency_model = fit(
        [LayerSample(rule, latency.median_ms) for rule, latency in layers],
        [samples[name] for name in fitted if name in samples],
        layout,
    )
    others = [samples[name] for name in checked if name in samples] or [samples["wall"]]
    report = check_fit(latency_model, others, layout)
    dense = passes.get("dense")
    extrapolated_ms = latency_model.predict_ms(Schedule.dense(depth), layout)
    return LatencyTable(
        layout=layout,
        layers=layers,
        passes=passes,
        model=latency_model,
        report=report,
        largest_error=report.largest_error,
        dense_ms=extrapolated_ms if dense is None else dense.median_ms,
        dense_extrapolated=dense is None,
        wall_ms=passes["wall"].median_ms,
    )


def passes_to_time(
    depth: int,
    operators: Sequence[Operators],
    query_factors: Sequence[int],
    key_value_factors: Sequence[int],
) -> tuple[dict[str, Pass], dict[str, Pass]]:
    """Return the passes that the model is fitted to, and those it is checked on, by name.

    It is fitted to the wall, dense, queries alone, keys and values alone, and both axes with each
    of the other operators. It is checked with half of the layers reduced on one axis and half on
    the other.
    """
    middle = (_middle(query_factors), _middle(key_value_factors))
    fitted: dict[str, Pass] = {"wall": "wall", "dense": "dense"}
    fitted["queries alone"] = Schedule.uniform(depth, middle[0], 1, operators=operators[0])
    for each in operators:
        query = 1 if each == operators[0] else middle[0]
        name = f"uniform {query}/{middle[1]}, {each.describe()}"
        fitted[name] = Schedule.uniform(depth, query, middle[1], operators=each)
    most = LayerRule(max(query_factors), 1), LayerRule(1, max(key_value_factors))
    mixed = tuple(most[layer % 2] for layer in range(depth))
    checked: dict[str, Pass] = {
        f"mixed, {each.describe()}": Schedule(mixed, each) for each in operators
    }
    return fitted, checked


def layer_grid(
    operators: Sequence[Operators], query_factors: Sequence[int], key_value_factors: Sequence[int]
) -> tuple[ResolvedRule, ...]:
    """Return rules that show every term: each axis alone, and queries with few keys as well."""
    grid: dict[ResolvedRule, None] = {ResolvedRule(): None}
    for each in operators:
        few = _middle(key_value_factors)
        pairs = [(1, r) for r in key_value_factors]
        pairs += [(r, few) for r in query_factors] + [(max(query_factors), max(key_value_factors))]
        pairs += [(min(2, max(query_factors)), 1)]
        grid |= {ResolvedRule(*pair, each): None for pair in pairs if pair != (1, 1)}
    return tuple(grid)


def time_layers(
    runner: Runner,
    images: Tensor,
    rules: Sequence[ResolvedRule],
    *,
    timer: Timer = Timer(),
    limit_s: float | None = None,
    progress: Progress = no_progress,
) -> tuple[tuple[ResolvedRule | None, Latency], ...]:
    """Return latencies of a global attention layer alone, under rules and returning zeros (None).

    Rules that do not fit into memory are left out.

    Args:
        runner: An unpatched model.
        images: A clip, ``[S, 3, H, W]``.
        rules: The rules.
        timer: Takes the latencies.
        limit_s: Approximate seconds to take; None for no limit.
        progress: Callback(samples taken, their total).

    Raises:
        FamilyError: If the global attention layers are not alike.
    """
    family, device = runner.family, runner.device
    _require_alike(runner.attention)
    layout = runner.layout(images)
    module, args, kwargs, lowered = runner.first_attention_call(images)
    zeros = wall_forward(family)
    within: dict[ResolvedRule | None, None] = {None: None}
    within |= {clamp(rule, layout): None for rule in rules}

    def call(rule: ResolvedRule | None) -> object:
        # Each call has its own context, so that it casts the weights like a pass does.
        with torch.inference_mode(), autocast(device, lowered):
            if rule is None:
                return zeros(module, layout, *args, **kwargs)
            if rule.is_dense:
                return module(*args, **kwargs)
            return family.reduced_forward(module, layout, rule, *args, **kwargs)

    treatments = [
        Treatment(str(number), partial(call, rule), subject=LayerTiming(rule, layout))
        for number, rule in enumerate(within)
    ]
    with evaluation_mode(module):
        timed = timer.time_in_turns(treatments, device=device, limit_s=limit_s, progress=progress)
    return tuple((rule, timed[str(n)]) for n, rule in enumerate(within) if str(n) in timed)


def time_passes(
    runner: Runner,
    images: Tensor,
    passes: Mapping[str, Pass],
    *,
    timer: Timer = Timer(),
    limit_s: float | None = None,
    progress: Progress = no_progress,
) -> dict[str, Latency]:
    """Return latencies of whole passes, timed in turns.

    Applying a schedule is not timed. Passes that do not fit into memory are left out.

    Args:
        runner: An unpatched model. It is unpatched again afterwards.
        images: A clip, ``[S, 3, H, W]``.
        passes: The passes, by name.
        timer: Takes the latencies.
        limit_s: Approximate seconds to take, but at least those of
            `spark3r.timing.samples_to_take`; None for no limit.
        progress: Callback(samples taken, their total).
    """
    layout, images = runner.layout(images), images.to(runner.device)
    treatments = [
        Treatment(
            name,
            partial(runner.run, images),
            partial(apply_pass, runner, each),
            PassTiming(each, layout),
        )
        for name, each in passes.items()
    ]
    try:
        return timer.time_in_turns(
            treatments, device=runner.device, limit_s=limit_s, progress=progress
        )
    finally:
        remove(runner.model)


def apply_pass(runner: Runner, what: Pass) -> None:
    """Put the model under a schedule, at the wall, or back to dense."""
    if isinstance(what, Schedule):
        apply(runner.model, what, family=runner.family)
    elif what == "wall":
        apply_wall(runner)
    else:
        remove(runner.model)


def resolved_rules(what: Pass, depth: int, layout: TokenLayout) -> tuple[ResolvedRule, ...]:
    """Return the rules of the ``depth`` layers in a pass, none at the wall."""
    if what == "wall":
        return ()
    schedule = what if isinstance(what, Schedule) else Schedule.dense(depth)
    return schedule.resolve_within(layout)


def _middle(factors: Sequence[int]) -> int:
    return sorted(factors)[len(factors) // 2]


def _require_alike(attention: Mapping[str, nn.Module]) -> None:
    shapes = {
        name: (type(module), tuple(tuple(p.shape) for p in module.parameters()))
        for name, module in attention.items()
    }
    if len(set(shapes.values())) > 1:
        raise FamilyError(
            "the global attention layers differ in class or size, so that one cannot be timed for "
            f"all: {', '.join(shapes)}"
        )


def relative_spread(*timings: Mapping[str, Latency]) -> float:
    """Return the spread of repeated timings of the same call, relative to their median.

    It is the median over the calls that were timed together, and the largest of several timings.
    """

    def median(latencies: Mapping[str, Latency]) -> float:
        shares = [each.spread_ms / each.median_ms for each in latencies.values() if each.n > 1]
        return statistics.median(shares) if shares else 0.0

    return max(map(median, timings), default=0.0)


def machine_slowdown(
    before_ms: Mapping[str, float], now: Mapping[str, Latency]
) -> tuple[float, float]:
    """Return how much slower the machine has become, and how much the calls disagree on that.

    Args:
        before_ms: Latencies of calls before, by name.
        now: Latencies now. They include at least one of the calls.

    Returns:
        The ratio of the sums of latencies, now ÷ before, and the log of the largest ÷ the smallest
        ratio of a single call.
    """
    both = [(now[name].median_ms, ms) for name, ms in before_ms.items() if name in now]
    ratios = [now_ms / ms for now_ms, ms in both]
    together = sum(now_ms for now_ms, _ in both) / sum(ms for _, ms in both)
    return together, math.log(max(ratios) / min(ratios))


def slowdown_from_model(timed: Sequence[tuple[float, float]], wall: tuple[float, float]) -> float:
    """Return measured ÷ predicted latency: the slowdown of the machine since the latency model.

    Args:
        timed: Measured and predicted latencies of schedules, of which the median ratio counts.
        wall: Measured and predicted wall. It is short and easily disturbed, and only counts if
            there is no schedule.
    """
    return statistics.median(measured / predicted for measured, predicted in timed or (wall,))


def shrunk_latency_ms(predicted_ms: float, measured_ms: float, spread: float) -> float:
    """Return a latency between a prediction and a measurement.

    It is their geometric mean, each weighted by its inverse squared error. On a quiet machine the
    measurement dominates, on a noisy one the prediction, which was fitted to many timings.

    Args:
        predicted_ms: Prediction of the latency model, with the error `PREDICTION_ERROR`.
        measured_ms: Median of a few timings.
        spread: Relative spread of timings just then, see `relative_spread`.
    """
    weight = PREDICTION_ERROR**2 / (PREDICTION_ERROR**2 + spread**2)
    return predicted_ms * float((measured_ms / predicted_ms) ** weight)
