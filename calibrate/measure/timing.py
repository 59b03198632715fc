"""Timing a live model: its global attention layers alone, and whole passes.

Layers are timed through the family's own ``attend`` on the hidden states of a real pass at the
target length. The global layers of a model are alike, so the first one stands for all.
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
from spark3r.layout import TokenLayout
from spark3r.patching.patch import apply, remove
from spark3r.patching.wall import apply_wall, wall_attend
from spark3r.reduction.operators import Operators
from spark3r.reduction.rule import ResolvedRule, clamp
from spark3r.runner import Runner, autocast
from spark3r.schedule import LayerRule, Schedule
from spark3r.timing import Latency, Timer, Treatment

from ..defaults import PREDICTION_ERROR, TIMED_KEY_VALUE_FACTORS, TIMED_QUERY_FACTORS
from ..progress import Progress, Reporter, no_progress
from .latency_model import FitReport, LatencyModel, LayerSample, PassSample, check_fit, fit

Pass = Schedule | Literal["dense", "wall"]
"""A whole pass of the model: under a schedule, dense, or with global attention returning zeros."""


@dataclass(frozen=True)
class PassTiming:
    """A whole pass that is timed, for a timer that looks latencies up.

    Attributes:
        what: The pass.
        layout: Token layout of the clip.
    """

    what: Pass
    layout: TokenLayout


@dataclass(frozen=True)
class LayerTiming:
    """A global attention layer that is timed alone, for a timer that looks latencies up.

    Attributes:
        rule: Its resolved rule, None where it returns zeros.
        layout: Token layout of the clip.
    """

    rule: ResolvedRule | None
    layout: TokenLayout


@dataclass(frozen=True)
class LatencyTable:
    """What was timed at one length, and the model fitted to it.

    Attributes:
        layout: Token layout of the clips timed.
        layers: Layers alone: resolved rule (None for the layer that returns zeros), and latency.
        passes: Whole passes by name, ``dense`` and ``wall`` among them where they fit.
        model: The latency model.
        report: Its error on passes that it was not fitted on, None where it is a profile's.
        known_error: Its largest error as a profile has it, where there is no report.
        dense_ms: Dense latency per clip.
        dense_extrapolated: Whether that is the latency model's word, because dense does not fit.
        wall_ms: The wall per clip, measured.
    """

    layout: TokenLayout
    layers: tuple[tuple[ResolvedRule | None, Latency], ...]
    passes: Mapping[str, Latency]
    model: LatencyModel
    report: FitReport | None
    dense_ms: float
    dense_extrapolated: bool
    wall_ms: float
    known_error: float = 0.0

    @property
    def largest_error(self) -> float:
        """Largest error of the latency model, as a share."""
        return self.known_error if self.report is None else self.report.largest_error


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
        runner: An unpatched model; it is unpatched again afterwards.
        images: A clip of the target length, ``[S, 3, H, W]``.
        operators: The operators that schedules may use, each of which is timed.
        timer: Takes the latencies.
        query_factors: Query factors of the layer grid.
        key_value_factors: Key-value factors of the layer grid.
        limit_s: About how many seconds the layers, and again the passes, may take; None for no
            limit.
        reporter: Receives the samples taken.

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
    unseen_passes = [samples[name] for name in checked if name in samples] or [samples["wall"]]
    dense = passes.get("dense")
    extrapolated_ms = latency_model.predict_ms(Schedule.dense(depth), layout)
    return LatencyTable(
        layout,
        layers,
        passes,
        latency_model,
        check_fit(latency_model, unseen_passes, layout),
        extrapolated_ms if dense is None else dense.median_ms,
        dense is None,
        passes["wall"].median_ms,
    )


def passes_to_time(
    depth: int,
    operators: Sequence[Operators],
    query_factors: Sequence[int],
    key_value_factors: Sequence[int],
) -> tuple[dict[str, Pass], dict[str, Pass]]:
    """Return the passes that the model is fitted to, and those it is checked on, by name.

    Fitted: the wall, dense, queries alone, keys and values alone, and both with the operators that
    are left. Checked: half of the layers on one axis and half on the other.
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
    """Return rules that show every term: each axis alone, and the queries at few keys as well."""
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
    """Time a global attention layer alone under resolved rules, and returning zeros (None).

    Rules that do not fit into memory are left out.

    Args:
        runner: An unpatched model.
        images: A clip, ``[S, 3, H, W]``.
        rules: The rules, with their operators.
        timer: Takes the latencies.
        limit_s: About how many seconds to take; None for no limit.
        progress: Callback(samples taken, their total).

    Raises:
        FamilyError: If the global attention layers are not alike.
    """
    family, device = runner.family, runner.device
    _require_alike(runner.attention)
    layout = runner.layout(images)
    module, args, kwargs, lowered = runner.first_attention_call(images)
    zeros = wall_attend(family)
    within: dict[ResolvedRule | None, None] = {None: None}
    within |= {clamp(rule, layout): None for rule in rules}

    def call(rule: ResolvedRule | None) -> object:
        # A context per call, so that weights are cast in each, as they are in each pass.
        with torch.inference_mode(), autocast(device, lowered):
            if rule is None:
                return zeros(module, layout, *args, **kwargs)
            if rule.is_dense:
                return module(*args, **kwargs)
            return family.attend(module, layout, rule, *args, **kwargs)

    treatments = [
        Treatment(str(number), partial(call, rule), subject=LayerTiming(rule, layout))
        for number, rule in enumerate(within)
    ]
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
    """Time whole passes under schedules, dense and at the wall, in turns.

    Applying a schedule is not timed. Passes that do not fit into memory are left out.

    Args:
        runner: An unpatched model; it is unpatched again afterwards.
        images: A clip, ``[S, 3, H, W]``.
        passes: The passes to time, by name.
        timer: Takes the latencies.
        limit_s: About how many seconds to take, though not less than
            `spark3r.timing.samples_to_take` needs; None for no limit.
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
    """Leave the model under a schedule, at the wall, or dense."""
    if isinstance(what, Schedule):
        apply(runner.model, what, family=runner.family)
    elif what == "wall":
        apply_wall(runner)
    else:
        remove(runner.model)


def resolved_rules(what: Pass, depth: int, layout: TokenLayout) -> tuple[ResolvedRule, ...]:
    """Return the rules that a pass gives ``depth`` layers; none at the wall."""
    if what == "wall":
        return ()
    schedule = what if isinstance(what, Schedule) else Schedule.dense(depth)
    return tuple(clamp(rule, layout) for rule in schedule.resolve(layout.frames))


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


def unrest_of(*timings: Mapping[str, Latency]) -> float:
    """Return how much timings of the same call differ, as a share.

    The median over calls, and of timings from several times that of the busiest.
    """
    return max(map(_median_share, timings), default=0.0)


def drift_of(then_ms: Mapping[str, float], now: Mapping[str, Latency]) -> tuple[float, float]:
    """Return how much slower a machine has become, and how unsure that is.

    Args:
        then_ms: What calls took, by name.
        now: What they take, by name; one of them at least has to be among them.

    Returns:
        What they take together divided by what they took; and by how much that ratio differs
        between them, as a share.
    """
    known = [(now[name].median_ms, took_ms) for name, took_ms in then_ms.items() if name in now]
    slower = [takes_ms / took_ms for takes_ms, took_ms in known]
    together = sum(takes_ms for takes_ms, _ in known) / sum(took_ms for _, took_ms in known)
    return together, math.log(max(slower) / min(slower))


def pace_of(timed: Sequence[tuple[float, float]], wall: tuple[float, float]) -> float:
    """Return how much slower a machine is than a latency model has it.

    Args:
        timed: Measured and predicted latencies of schedules.
        wall: The same of the wall, which is short and easily disturbed: taken where there is no
            schedule.
    """
    return statistics.median(now_ms / predicted_ms for now_ms, predicted_ms in timed or (wall,))


def believed_ms(predicted_ms: float, measured_ms: float, unrest: float) -> float:
    """Return the latency to believe in, between what was predicted and what was measured.

    Their geometric mean, each weighing as the inverse of its squared error: timings of a quiet
    machine stand, those of a busy one hardly move a prediction that was fitted to many more.

    Args:
        predicted_ms: What the latency model says.
        measured_ms: Median of a few timings.
        unrest: How much timings of the same call differ just then, as a share.
    """
    weight = PREDICTION_ERROR**2 / (PREDICTION_ERROR**2 + unrest**2)
    return predicted_ms * float((measured_ms / predicted_ms) ** weight)


def _median_share(latencies: Mapping[str, Latency]) -> float:
    shares = [each.spread_ms / each.median_ms for each in latencies.values() if each.n > 1]
    return statistics.median(shares) if shares else 0.0
