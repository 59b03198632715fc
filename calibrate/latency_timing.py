"""Timing a live model: its global attention layers alone, and whole passes.

Layers are timed through the family's own ``attend`` on the hidden states of a real pass at the
target length. The global layers of a model are alike, so the first one stands for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from spark3r.errors import FamilyError
from spark3r.families import Family, detect, unwrap
from spark3r.inference import device_of, first_attention_call, layout_of, run
from spark3r.layout import TokenLayout
from spark3r.memory import is_out_of_memory
from spark3r.patching import apply, remove
from spark3r.reduction import clamp
from spark3r.schedule import LayerRule, Operators, Schedule
from spark3r.timing import WARM_UP_S, Call, Latency, interleaved, make_stopwatch, warm_up
from spark3r.wall import apply_wall, wall_family

from .latency import LatencyModel
from .latency_fit import FitReport, LayerSample, PassSample, check_fit, fit

Treatment = Schedule | Literal["dense", "wall"]

QUERY_FACTORS = (1, 2, 3, 4, 8)
KEY_VALUE_FACTORS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class LatencyTable:
    """What was timed at one length, and the model fitted to it.

    Attributes:
        layout: Token layout of the clips timed.
        layers: Layers alone: resolved rule (None for the layer that returns zeros), and latency.
        passes: Whole passes by name, ``dense`` and ``wall`` among them where they fit.
        model: The latency model.
        report: Its error on passes that it was not fitted on.
        dense_ms: Dense latency per clip.
        dense_extrapolated: Whether that is the latency model's word, because dense does not fit.
        wall_ms: The wall per clip, measured.
    """

    layout: TokenLayout
    layers: tuple[tuple[LayerRule | None, Latency], ...]
    passes: Mapping[str, Latency]
    model: LatencyModel
    report: FitReport
    dense_ms: float
    dense_extrapolated: bool
    wall_ms: float


def measure_latency(
    model: nn.Module,
    images: Tensor,
    operators: Sequence[Operators],
    *,
    family: Family | None = None,
    query_factors: Sequence[int] = QUERY_FACTORS,
    key_value_factors: Sequence[int] = KEY_VALUE_FACTORS,
    limit_s: float | None = None,
) -> LatencyTable:
    """Time a model at the target length and fit its latency model.

    Args:
        model: An unpatched model; it is unpatched again afterwards.
        images: A clip of the target length, ``[S, 3, H, W]``.
        operators: The operators that schedules may use, each of which is timed.
        family: What is known of the model; None recognises it.
        query_factors: Query factors of the layer grid.
        key_value_factors: Key-value factors of the layer grid.
        limit_s: About how many seconds the layers, and again the passes, may take; None for no
            limit.

    Raises:
        FamilyError: If the global attention layers are not alike, or the wall does not fit.
    """
    root = unwrap(model)
    family = detect(root) if family is None else family
    layout = layout_of(model, images, family)
    rules = layer_grid(operators, query_factors, key_value_factors)
    layers = time_layers(model, images, rules, family=family, limit_s=limit_s)

    depth = len(family.attention(root))
    query, key_value = max(query_factors), max(key_value_factors)
    fitted: dict[str, Treatment] = {"wall": "wall", "dense": "dense"}
    checked: dict[str, Treatment] = {}
    for number, each in enumerate(operators):
        middle = (_middle(query_factors), _middle(key_value_factors))
        fitted[f"uniform {middle} {number}"] = Schedule.uniform(depth, *middle, operators=each)
        mixed = [LayerRule(1, key_value) if i % 2 else LayerRule(query, 1) for i in range(depth)]
        checked[f"mixed {number}"] = Schedule(tuple(mixed), each)
        halved = Schedule.uniform(depth, 1, middle[1], operators=each)
        checked[f"key-value {number}"] = halved
    treatments = fitted | checked
    passes = time_passes(model, images, treatments, family=family, limit_s=limit_s)
    if "wall" not in passes:
        raise FamilyError(
            f"a clip of {layout.frames} frames does not fit even without global attention: choose "
            "a shorter target length"
        )
    samples = {
        name: PassSample(name, resolved_rules(treatments[name], depth, layout), latency.median_ms)
        for name, latency in passes.items()
    }
    latency_model = fit(
        [LayerSample(rule, latency.median_ms) for rule, latency in layers],
        [samples[name] for name in fitted if name in samples],
        layout,
    )
    unseen = [samples[name] for name in checked if name in samples] or [samples["wall"]]
    dense = passes.get("dense")
    extrapolated_ms = latency_model.predict_ms(Schedule.dense(depth), layout)
    return LatencyTable(
        layout,
        layers,
        passes,
        latency_model,
        check_fit(latency_model, unseen, layout),
        extrapolated_ms if dense is None else dense.median_ms,
        dense is None,
        passes["wall"].median_ms,
    )


def layer_grid(
    operators: Sequence[Operators], query_factors: Sequence[int], key_value_factors: Sequence[int]
) -> tuple[LayerRule, ...]:
    """Return rules that show every term: each axis alone, and the queries at few keys as well."""
    grid: dict[LayerRule, None] = {LayerRule(operators=operators[0]): None}
    for each in operators:
        few = _middle(key_value_factors)
        pairs = [(1, r) for r in key_value_factors]
        pairs += [(r, few) for r in query_factors] + [(max(query_factors), max(key_value_factors))]
        pairs += [(min(2, max(query_factors)), 1)]
        grid |= {LayerRule(*pair, each): None for pair in pairs if pair != (1, 1)}
    return tuple(grid)


def time_layers(
    model: nn.Module,
    images: Tensor,
    rules: Sequence[LayerRule],
    *,
    family: Family | None = None,
    limit_s: float | None = None,
) -> tuple[tuple[LayerRule | None, Latency], ...]:
    """Time a global attention layer alone under resolved rules, and returning zeros (None).

    Rules that do not fit into memory are left out.

    Raises:
        FamilyError: If the global attention layers are not alike.
    """
    root = unwrap(model)
    family = detect(root) if family is None else family
    _require_alike(family.attention(root))
    layout = layout_of(model, images, family)
    module, args, kwargs = first_attention_call(model, images, family)
    zeros = wall_family(family).attend
    within: dict[LayerRule | None, None] = {None: None}
    within |= {clamp(rule, layout): None for rule in rules}

    def call_of(rule: LayerRule | None) -> Call:
        def call() -> object:
            with torch.inference_mode():
                if rule is None:
                    return zeros(module, layout, LayerRule(), *args, **kwargs)
                if rule.is_dense:
                    return module(*args, **kwargs)
                return family.attend(module, layout, rule, *args, **kwargs)

        return call

    calls = {str(number): call_of(rule) for number, rule in enumerate(within)}
    timed = _timed_if_they_fit(calls, device_of(model), limit_s)
    return tuple((rule, timed[str(n)]) for n, rule in enumerate(within) if str(n) in timed)


def time_passes(
    model: nn.Module,
    images: Tensor,
    treatments: Mapping[str, Treatment],
    *,
    family: Family | None = None,
    limit_s: float | None = None,
) -> dict[str, Latency]:
    """Time whole passes under schedules, dense and at the wall, in turns.

    Applying a schedule is not timed. Passes that do not fit into memory are left out.

    Args:
        model: The model; it is unpatched afterwards.
        images: ``[S, 3, H, W]``.
        treatments: What to time, by name.
        family: What is known of the model; None recognises it.
        limit_s: About how many seconds to take, after at least three samples of each.
    """

    def before(name: str) -> None:
        treatment = treatments[name]
        if isinstance(treatment, Schedule):
            apply(model, treatment, family=family)
        elif treatment == "wall":
            apply_wall(model, family)
        else:
            remove(model)

    known = detect(model) if family is None else family
    device = device_of(model)
    images = images.to(device)
    calls: dict[str, Call] = {name: lambda: run(model, images, known) for name in treatments}
    try:
        return _timed_if_they_fit(calls, device, limit_s, before)
    finally:
        remove(model)


def resolved_rules(treatment: Treatment, depth: int, layout: TokenLayout) -> tuple[LayerRule, ...]:
    """Return the rules that a treatment gives ``depth`` layers; none for the wall."""
    if treatment == "wall":
        return ()
    schedule = treatment if isinstance(treatment, Schedule) else Schedule.dense(depth)
    return tuple(clamp(rule, layout) for rule in schedule.resolve(layout.frames))


def _timed_if_they_fit(
    calls: Mapping[str, Call],
    device: torch.device,
    limit_s: float | None,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, Latency]:
    warm_up_s = WARM_UP_S
    if limit_s is not None:
        warm_up_s = min(WARM_UP_S, 0.1 * limit_s / max(1, len(calls)))
    stopwatch = make_stopwatch(device)
    fitting = {}
    for name, call in calls.items():
        before(name)
        try:
            warm_up(call, stopwatch, warm_up_s)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if device.type == "cuda":
                torch.cuda.empty_cache()
        else:
            fitting[name] = call
    return interleaved(fitting, before=before, device=device, warm_up_s=0, limit_s=limit_s)


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
