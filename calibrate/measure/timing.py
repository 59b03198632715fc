"""Timing of a live model: its global attention layers alone, and whole passes.

Layers are timed through the family's own ``reduced_forward`` on the hidden states of a real pass at
one length. All global layers of a model have the same size, so only the first one is timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from spark3r.schedule import Schedule
from spark3r.timing import Latency, Timer, Treatment

from ..defaults import (
    LEAST_SAMPLES,
    TIMED_KEY_VALUE_FACTORS,
    TIMED_QUERY_FACTORS,
    TYPICAL_SAMPLES,
)
from ..progress import Progress, Reporter, no_progress
from .latency_model import LayerSample, PassSample, fit
from .one_pace import at_one_pace

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
class Fit:
    """Timings at one length, and the latency model that was fitted to them.

    Attributes:
        layout: Token layout of the timed clip.
        layers: Resolved rule and latency of layers alone; None for the layer that returns zeros.
        passes: Latencies of whole passes by name, with ``wall``, and ``dense`` if it fits.
        model: The latency model.
        beside: Latencies by name of further passes that were timed in turns with these.
    """

    layout: TokenLayout
    layers: tuple[tuple[ResolvedRule | None, Latency], ...]
    passes: Mapping[str, Latency]
    model: LatencyModel
    beside: Mapping[str, Latency] = field(default_factory=dict)


def fit_latency(
    runner: Runner,
    images: Tensor,
    operators: Sequence[Operators],
    *,
    timer: Timer = Timer(),
    query_factors: Sequence[int] = TIMED_QUERY_FACTORS,
    key_value_factors: Sequence[int] = TIMED_KEY_VALUE_FACTORS,
    limit_s: float | None = None,
    beside: Sequence[TimedPass] = (),
    reporter: Reporter = Reporter(),
) -> Fit:
    """Time a model at one length and fit its latency model.

    Args:
        runner: An unpatched model. It is unpatched again afterwards.
        images: A clip, ``[S, 3, H, W]``.
        operators: Operators that schedules may use. Each of them is timed.
        timer: Takes the latencies.
        query_factors: Query factors of the timed layers.
        key_value_factors: Key-value factors of the timed layers.
        limit_s: Approximate seconds for the layers, and again for the passes, of which each has at
            least `TYPICAL_SAMPLES` samples; None for no limit.
        beside: Passes over other clips, to be timed in turns with those that the model is fitted
            to. Their names are others.
        reporter: Receives the progress.

    Raises:
        FamilyError: If the global attention layers are not alike, or the wall does not fit.
    """
    layout, depth = runner.layout(images), runner.depth
    rules = layer_grid(operators, query_factors, key_value_factors)
    step = reporter.step("latency of layers")
    layers = time_layers(runner, images, rules, timer=timer, limit_s=limit_s, progress=step)
    to_time = passes_to_time(depth, operators, query_factors, key_value_factors)
    step = reporter.step("latency of passes")
    timed = time_passes(
        runner,
        [
            *(TimedPass(name, each, images, TYPICAL_SAMPLES) for name, each in to_time.items()),
            *beside,
        ],
        timer=timer,
        limit_s=limit_s,
        # On a CPU only the first run of a process is much slower, and layers have run by now.
        warmed_up=runner.device.type == "cpu",
        progress=step,
    )
    passes = {name: each for name, each in timed.items() if name in to_time}
    if "wall" not in passes:
        raise FamilyError(too_long(layout.frames))
    latency_model = fit(
        [LayerSample(rule, latency.median_ms) for rule, latency in layers],
        [
            PassSample(
                name, resolved_rules(to_time[name], depth, layout), typical(latency).median_ms
            )
            for name, latency in passes.items()
        ],
        layout,
    )
    others = {name: each for name, each in timed.items() if name not in to_time}
    return Fit(layout, layers, passes, latency_model, others)


def typical(latency: Latency) -> Latency:
    """Return one sample: the median of three or more, and the faster one of two.

    One of two may have been disturbed. The fastest of more is biased, the more so the more there
    are, and differences of passes suffer from that.
    """
    samples = latency.samples_ms
    ms = latency.median_ms if len(samples) >= TYPICAL_SAMPLES else min(samples)
    return Latency((ms,), latency.busy)


def too_long(frames: int) -> str:
    """Return the message for a clip that does not fit into memory even at the wall."""
    return (
        f"a clip of {frames} frames does not fit even without global attention: give a shorter "
        "--target-frames"
    )


def passes_to_time(
    depth: int,
    operators: Sequence[Operators],
    query_factors: Sequence[int],
    key_value_factors: Sequence[int],
) -> dict[str, Pass]:
    """Return the passes that the model is fitted to, by name.

    They are the wall, dense, queries alone, keys and values alone, and both axes with each of the
    other operators.
    """
    middle = (_middle(query_factors), _middle(key_value_factors))
    passes: dict[str, Pass] = {"wall": "wall", "dense": "dense"}
    passes["queries alone"] = Schedule.uniform(depth, middle[0], 1, operators=operators[0])
    for each in operators:
        query = 1 if each == operators[0] else middle[0]
        name = f"uniform {query}/{middle[1]}, {each.describe()}"
        passes[name] = Schedule.uniform(depth, query, middle[1], operators=each)
    return passes


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


@dataclass(frozen=True)
class TimedPass:
    """A whole pass to time.

    Attributes:
        name: Name, unique among the passes that are timed together.
        what: The pass.
        images: The clip, ``[S, 3, H, W]``, on any device.
        least: Samples that are taken whatever the time limit.
    """

    name: str
    what: Pass
    images: Tensor
    least: int = LEAST_SAMPLES


def time_passes(
    runner: Runner,
    passes: Sequence[TimedPass],
    *,
    timer: Timer = Timer(),
    limit_s: float | None = None,
    warmed_up: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Latency]:
    """Return latencies of whole passes, timed in turns, at one pace of the machine.

    Applying a schedule is not timed. Passes that do not fit into memory are left out.

    Args:
        runner: An unpatched model. It is unpatched again afterwards.
        passes: The passes.
        timer: Takes the latencies.
        limit_s: Approximate seconds to take; None for no limit.
        warmed_up: Whether the first run of each pass is a sample, without a run before it.
        progress: Callback(samples taken, their total).
    """
    clips = {id(each.images): each.images.to(runner.device) for each in passes}
    treatments = [
        Treatment(
            each.name,
            partial(runner.run, clips[id(each.images)]),
            partial(apply_pass, runner, each.what),
            PassTiming(each.what, runner.layout(each.images)),
        )
        for each in passes
    ]
    try:
        timed = timer.time_in_turns(
            treatments,
            device=runner.device,
            limit_s=limit_s,
            least={each.name: each.least for each in passes},
            warmed_up=warmed_up,
            progress=progress,
        )
        return at_one_pace(timed)
    finally:
        remove(runner.model)


def apply_pass(runner: Runner, what: Pass) -> None:
    """Put the model under a schedule, at the wall, or back to dense."""
    if isinstance(what, Schedule):
        apply(runner.model, what, family=runner.family, guard=False)
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
