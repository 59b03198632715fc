"""Timing a live model: its global attention layers alone, and whole passes.

Layers are timed through the family's own ``attend`` on the hidden states of a real pass at the
target length. The global layers of a model are alike, so the first one stands for all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from spark3r.errors import FamilyError
from spark3r.families.base import Family, unwrap
from spark3r.families.registry import detect
from spark3r.layout import TokenLayout
from spark3r.memory import is_out_of_memory
from spark3r.patching.patch import apply, remove
from spark3r.patching.wall import apply_wall, wall_attend
from spark3r.reduction.operators import Operators
from spark3r.reduction.rule import ResolvedRule, clamp
from spark3r.runner import Runner, autocast, device_of, first_attention_call, layout_of, run
from spark3r.schedule import LayerRule, Schedule
from spark3r.timing import (
    MIN_ROUNDS,
    ROUNDS,
    WARM_UP_S,
    Call,
    Latency,
    interleaved,
    make_stopwatch,
    warm_up,
)

from ..progress import Progress, Samples, uncounted, unseen
from .latency_model import FitReport, LatencyModel, LayerSample, PassSample, check_fit, fit

Treatment = Schedule | Literal["dense", "wall"]

LONG_S, VERY_LONG_S = 3.0, 10.0
"""From these on a call needs fewer samples, because a single one is a mean over much work."""

KEPT_S = 1.0
"""From this on the first run of a call is a sample: what is new to it, such as the indices of its
factors, is a small part."""

TIMED_QUERY_FACTORS = (1, 2, 3, 4, 8)
TIMED_KEY_VALUE_FACTORS = (1, 2, 4, 8, 16, 32, 64)


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
    model: nn.Module,
    images: Tensor,
    operators: Sequence[Operators],
    *,
    family: Family | None = None,
    dtype: torch.dtype | None = None,
    query_factors: Sequence[int] = TIMED_QUERY_FACTORS,
    key_value_factors: Sequence[int] = TIMED_KEY_VALUE_FACTORS,
    limit_s: float | None = None,
    progress: Progress = unseen,
) -> LatencyTable:
    """Time a model at the target length and fit its latency model.

    Args:
        model: An unpatched model; it is unpatched again afterwards.
        images: A clip of the target length, ``[S, 3, H, W]``.
        operators: The operators that schedules may use, each of which is timed.
        family: What is known of the model; None recognises it.
        dtype: Precision of the passes, as `spark3r.runner.run` takes it.
        query_factors: Query factors of the layer grid.
        key_value_factors: Key-value factors of the layer grid.
        limit_s: About how many seconds the layers, and again the passes, may take; None for no
            limit.
        progress: Told of the samples taken.

    Raises:
        FamilyError: If the global attention layers are not alike, or the wall does not fit.
    """
    root = unwrap(model)
    family = detect(root) if family is None else family
    layout = layout_of(model, images, family, dtype)
    rules = layer_grid(operators, query_factors, key_value_factors)
    step = partial(progress, "latency of layers")
    layers = time_layers(
        model, images, rules, family=family, dtype=dtype, limit_s=limit_s, progress=step
    )
    fitted, checked = passes_to_time(
        len(family.attention(root)), operators, query_factors, key_value_factors
    )
    treatments = fitted | checked
    step = partial(progress, "latency of passes")
    passes = time_passes(
        model, images, treatments, family=family, dtype=dtype, limit_s=limit_s, progress=step
    )
    if "wall" not in passes:
        raise FamilyError(
            f"a clip of {layout.frames} frames does not fit even without global attention: choose "
            "a shorter target length"
        )
    depth = len(family.attention(root))
    samples = {
        name: PassSample(name, resolved_rules(treatments[name], depth, layout), latency.median_ms)
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
) -> tuple[dict[str, Treatment], dict[str, Treatment]]:
    """Return the passes that the model is fitted to, and those it is checked on, by name.

    Fitted: the wall, dense, queries alone, keys and values alone, and both with the operators that
    are left. Checked: half of the layers on one axis and half on the other.
    """
    middle = (_middle(query_factors), _middle(key_value_factors))
    fitted: dict[str, Treatment] = {"wall": "wall", "dense": "dense"}
    fitted["queries alone"] = Schedule.uniform(depth, middle[0], 1, operators=operators[0])
    for each in operators:
        query = 1 if each == operators[0] else middle[0]
        name = f"uniform {query}/{middle[1]}, {each.describe()}"
        fitted[name] = Schedule.uniform(depth, query, middle[1], operators=each)
    most = LayerRule(max(query_factors), 1), LayerRule(1, max(key_value_factors))
    mixed = tuple(most[layer % 2] for layer in range(depth))
    checked: dict[str, Treatment] = {
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
    model: nn.Module,
    images: Tensor,
    rules: Sequence[ResolvedRule],
    *,
    family: Family | None = None,
    dtype: torch.dtype | None = None,
    limit_s: float | None = None,
    progress: Samples = uncounted,
) -> tuple[tuple[ResolvedRule | None, Latency], ...]:
    """Time a global attention layer alone under resolved rules, and returning zeros (None).

    Rules that do not fit into memory are left out.

    Raises:
        FamilyError: If the global attention layers are not alike.
    """
    root = unwrap(model)
    family = detect(root) if family is None else family
    _require_alike(family.attention(root))
    layout = layout_of(model, images, family, dtype)
    module, args, kwargs, lowered = first_attention_call(model, images, family, dtype)
    device = device_of(model)
    zeros = wall_attend(family)
    within: dict[ResolvedRule | None, None] = {None: None}
    within |= {clamp(rule, layout): None for rule in rules}

    def call_of(rule: ResolvedRule | None) -> Call:
        def call() -> object:
            # A context per call, so that weights are cast in each, as they are in each pass.
            with torch.inference_mode(), autocast(device, lowered):
                if rule is None:
                    return zeros(module, layout, *args, **kwargs)
                if rule.is_dense:
                    return module(*args, **kwargs)
                return family.attend(module, layout, rule, *args, **kwargs)

        return call

    calls = {str(number): call_of(rule) for number, rule in enumerate(within)}
    timed = _timed_if_they_fit(calls, device, limit_s, progress=progress)
    return tuple((rule, timed[str(n)]) for n, rule in enumerate(within) if str(n) in timed)


def time_passes(
    model: nn.Module,
    images: Tensor,
    treatments: Mapping[str, Treatment],
    *,
    family: Family | None = None,
    dtype: torch.dtype | None = None,
    limit_s: float | None = None,
    progress: Samples = uncounted,
) -> dict[str, Latency]:
    """Time whole passes under schedules, dense and at the wall, in turns.

    Applying a schedule is not timed. Passes that do not fit into memory are left out.

    Args:
        model: The model; it is unpatched afterwards.
        images: ``[S, 3, H, W]``.
        treatments: What to time, by name.
        family: What is known of the model; None recognises it.
        dtype: Precision of the passes, as `spark3r.runner.run` takes it.
        limit_s: About how many seconds to take, though not less than `samples_to_take` needs.
        progress: Told of the samples taken and their total.
    """
    known = detect(model) if family is None else family
    device = device_of(model)
    images = images.to(device)
    calls: dict[str, Call] = {name: lambda: run(model, images, known, dtype) for name in treatments}
    try:
        return _timed_if_they_fit(
            calls,
            device,
            limit_s,
            lambda name: apply_treatment(model, treatments[name], family),
            progress,
        )
    finally:
        remove(model)


def apply_treatment(model: nn.Module, treatment: Treatment, family: Family | None = None) -> None:
    """Leave the model under a schedule, at the wall, or dense."""
    if isinstance(treatment, Schedule):
        apply(model, treatment, family=family)
    elif treatment == "wall":
        apply_wall(Runner.of(model, family))
    else:
        remove(model)


def resolved_rules(
    treatment: Treatment, depth: int, layout: TokenLayout
) -> tuple[ResolvedRule, ...]:
    """Return the rules that a treatment gives ``depth`` layers; none for the wall."""
    if treatment == "wall":
        return ()
    schedule = treatment if isinstance(treatment, Schedule) else Schedule.dense(depth)
    return tuple(clamp(rule, layout) for rule in schedule.resolve(layout.frames))


def samples_to_take(seconds: Mapping[str, float], limit_s: float | None) -> dict[str, int]:
    """Return how many samples to take of calls that take so long.

    As many as the time limit has room for, each call having an equal share of it; at least three,
    at least two of a call that takes `LONG_S`, and one that takes `VERY_LONG_S` is its own mean.
    """

    def of(taken_s: float) -> int:
        least = MIN_ROUNDS - (taken_s >= LONG_S) - (taken_s >= VERY_LONG_S)
        if limit_s is None:
            return max(least, ROUNDS)
        room = limit_s / len(seconds) / max(taken_s, 1e-9)
        return max(least, min(ROUNDS, int(room)))

    return {name: of(taken_s) for name, taken_s in seconds.items()}


def _timed_if_they_fit(
    calls: Mapping[str, Call],
    device: torch.device,
    limit_s: float | None,
    before: Callable[[str], None] = lambda name: None,
    progress: Samples = uncounted,
) -> dict[str, Latency]:
    """Time the calls that fit into memory, in turns.

    The first run of all is for the machine alone. Then the first of each call is a warm-up, or from
    `KEPT_S` on a sample.
    """
    warm_up_s = WARM_UP_S
    if limit_s is not None:
        warm_up_s = min(WARM_UP_S, 0.1 * limit_s / max(1, len(calls)))
    stopwatch = make_stopwatch(device)
    first_s: dict[str, float] = {}
    for number, (name, call) in enumerate(calls.items()):
        progress(number, len(calls))
        before(name)
        try:
            if number == 0:
                call()  # in a process that has just begun it takes up to twice as long
            first_s[name] = stopwatch(call) / 1000
            warm_up(call, stopwatch, warm_up_s - first_s[name])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            first_s.pop(name, None)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    wanted = samples_to_take(first_s, limit_s)
    kept = {name: (1000 * taken_s,) for name, taken_s in first_s.items() if taken_s >= KEPT_S}
    left = {name: number - (name in kept) for name, number in wanted.items()}
    total, done = len(calls) + sum(left.values()), len(calls)

    def before_sample(name: str) -> None:
        nonlocal done
        progress(done, total)
        done += 1
        before(name)

    rounds = {name: number for name, number in left.items() if number}
    timed = interleaved(
        {name: calls[name] for name in rounds},
        before=before_sample,
        device=device,
        rounds=rounds,
        warm_up_s=0,
    )
    progress(total, total)
    return {
        name: Latency(kept.get(name, ()) + (timed[name].samples_ms if name in timed else ()))
        for name in first_s
    }


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


PREDICTION_ERROR = 0.03
"""Error of a prediction, as a share, that single timings are weighed against."""


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
