"""Residual drift: sensitivities of all layers and factors from one dense pass per clip.

While the dense model runs, each global attention layer also runs reduced on the same hidden states,
for every candidate. Drift is the change of the layer's contribution to the residual stream (after
output projection and LayerScale), root mean square over tokens and channels, relative to the stream
itself. It does not show how much of the change reaches the outputs: `fit_drift_to_probes` learns
that from a few end-to-end probes.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from spark3r.clips import Clip
from spark3r.families.base import Family
from spark3r.layout import TokenLayout
from spark3r.reduction.operators import Operators
from spark3r.reduction.rule import ResolvedRule, clamp
from spark3r.runner import Runner
from spark3r.schedule import operators_text

from ..progress import Progress, no_progress
from ..side_by_side import clips_at_once, side_by_side
from .probe import COLUMNS, SensitivityError

METRIC = "drift"
"""Name of drift in the table's column ``metric``."""

_Candidate = tuple[Operators, str, int]

Candidates = Mapping[_Candidate, ResolvedRule]
"""Reductions to try, by operators, axis and factor."""

Samples = dict[tuple[int, _Candidate], float]
"""Drift of one clip by layer and candidate."""

DriftSamples = Callable[[Candidates, Progress], Sequence[Samples]]
"""Function(candidates, callback(clips run, their total)) that returns the drift of each clip."""


def drift(
    runner: Runner,
    clips: Sequence[Clip],
    operators: Sequence[Operators],
    *,
    query_factors: Sequence[int] = (),
    key_value_factors: Sequence[int] = (),
    progress: Progress = no_progress,
    samples: DriftSamples | None = None,
) -> pd.DataFrame:
    """Measure the residual drift of every layer and candidate around the dense model.

    Args:
        runner: An unpatched model.
        clips: The clips. Factors are brought down to the largest that the shortest clip allows.
        operators: Operators to try.
        query_factors: Query factors to try.
        key_value_factors: Key-value factors to try.
        progress: Callback(clips run, their total).
        samples: Function that returns the drift of each clip; None runs the clips here.

    Returns:
        A table like that of `calibrate.measure.probe`. Its profiler and its only metric are
        ``drift``.

    Raises:
        SensitivityError: If a drift is not finite. The message names layer and factor.
        ValueError: If there is no clip.
    """
    if not clips:
        raise ValueError("there is no clip to measure drift on")
    shortest = runner.layout(min(clips, key=lambda clip: clip.frames).images)
    candidates = _candidates(operators, query_factors, key_value_factors, shortest)
    if samples is None:
        found: Sequence[Samples] = drift_by_clip(runner, clips, candidates, progress)
    else:
        found = samples(candidates, progress)
        progress(len(clips), len(clips))
    rows = []
    for layer, (each, axis, factor) in found[0]:
        values = [each_clip[layer, (each, axis, factor)] for each_clip in found]
        rows.append(
            {
                "profiler": "drift",
                "operators": operators_text(each),
                "layer": layer,
                "axis": axis,
                "factor": factor,
                "metric": METRIC,
                "mean": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
                "clips": len(values),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def drift_by_clip(
    runner: Runner, clips: Sequence[Clip], candidates: Candidates, progress: Progress = no_progress
) -> list[Samples]:
    """Return the drift of every layer and candidate in a dense pass over each clip.

    Raises:
        SensitivityError: If a drift is not finite.
    """
    layouts = [runner.layout(clip.images) for clip in clips]
    passes = _Passes()

    def run(number: int) -> Samples:
        passes.name, passes.layout, passes.samples = clips[number].name, layouts[number], {}
        runner.run(clips[number].images)
        return passes.samples

    # Hooks are the same for all threads, because PyTorch calls those that are removed meanwhile.
    with ExitStack() as hooks:
        for layer, (name, module) in enumerate(runner.attention.items()):
            block = runner.root.get_submodule(name.rpartition(".")[0])
            record = partial(_record, passes, layer, name)
            _watch(hooks, runner.family, module, block, passes, candidates, record)
        return side_by_side(run, range(len(clips)), clips_at_once(runner.root), progress)


class _Passes(threading.local):
    """The pass that the thread runs: its clip, and what its layers have given so far."""

    name: str
    layout: TokenLayout
    samples: Samples
    stream: tuple[Tensor, ...] = ()


def fit_drift_to_probes(
    drifts: pd.DataFrame, probes: pd.DataFrame, metric: str, beside: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Convert drift into a metric of the outputs by means of a few probes.

    The metric is assumed to grow in proportion to drift, with a slope per layer and axis. The slope
    is the mean of two least squares fits, to the probes of that layer and axis under any operators,
    and to all probes of the axis. A layer has few probes, and most of the difference of its slope
    from others is noise (docs/method/sensitivity.md). A layer without probes has the slope of the
    axis.

    Args:
        drifts: Table from `drift`.
        probes: Table from `calibrate.measure.probe.probe` around the dense model. A few factors
            suffice.
        metric: A metric of the probes.
        beside: Drift of the probed candidates on the probed clips, so that the slopes do not depend
            on the clips; None takes ``drifts``.

    Returns:
        The table of drifts with ``metric`` in place of ``drift``, means and spreads in its units.

    Raises:
        SensitivityError: If an axis of the drifts has no probe of the metric.
    """
    keys = ["operators", "layer", "axis", "factor"]
    seen = probes[probes["metric"] == metric]
    both = (drifts if beside is None else beside).merge(seen, on=keys, suffixes=("", "_probe"))
    point = seen[seen["factor"] == 1].groupby(["layer", "axis"])["mean"].first()
    dense = float(point.mean()) if len(point) else 0.0
    by_axis: dict[str, float] = {}
    by_layer: dict[tuple[int, str], float] = {}
    for axis in drifts["axis"].unique():
        part = both[(both["axis"] == axis) & (both["factor"] > 1)]
        if part.empty:
            raise SensitivityError(f"no probe says what drift on axis {axis} does to '{metric}'")
        by_axis[axis] = _slope(part, dense)
        for layer, rows in part.groupby("layer"):
            by_layer[int(layer), axis] = (_slope(rows, dense) + by_axis[axis]) / 2
    slopes = [
        by_layer.get((int(layer), axis), by_axis[axis])
        for layer, axis in zip(drifts["layer"], drifts["axis"], strict=True)
    ]
    scaled = drifts.copy()
    scaled["metric"] = metric
    scaled["mean"] = dense + drifts["mean"] * slopes
    scaled["spread"] = drifts["spread"] * [abs(slope) for slope in slopes]
    return scaled


def rank_agreement(drifts: pd.DataFrame, probes: pd.DataFrame, metric: str) -> dict[str, float]:
    """Return Spearman's rank correlation of drift with a probed metric, per axis.

    Args:
        drifts: Table from `drift` or `fit_drift_to_probes`.
        probes: Table from `calibrate.measure.probe.probe`, on other clips for a fair comparison.
        metric: A metric of the probes.

    Returns:
        The correlation for each axis on which both tables have three rows above factor 1.
    """
    keys = ["operators", "layer", "axis", "factor"]
    both = drifts.merge(probes[probes["metric"] == metric], on=keys, suffixes=("", "_probe"))
    both = both[both["factor"] > 1]
    found = {}
    for axis, rows in both.groupby("axis"):
        if len(rows) >= 3:
            found[str(axis)] = float(spearmanr(rows["mean"], rows["mean_probe"]).statistic)
    return found


def _record(
    passes: _Passes,
    layer: int,
    name: str,
    candidate: _Candidate,
    value: float,
) -> None:
    if not math.isfinite(value):
        raise SensitivityError(
            f"layer {layer} ({name}, clip '{passes.name}'), {candidate[1]} factor {candidate[2]}: "
            f"drift is {value}; if the model runs in half precision, try float32 or bfloat16"
        )
    passes.samples[layer, candidate] = value


def _candidates(
    operators: Sequence[Operators],
    query_factors: Sequence[int],
    key_value_factors: Sequence[int],
    layout: TokenLayout,
) -> Candidates:
    """Return all candidates within the layout, including factor 1 of each axis."""
    found: dict[_Candidate, ResolvedRule] = {}
    for each in operators:
        for factor in sorted({1, *query_factors} if query_factors else ()):
            rule = clamp(ResolvedRule(factor, 1, each), layout)
            found[each, "query", rule.query] = rule
        for factor in sorted({1, *key_value_factors} if key_value_factors else ()):
            rule = clamp(ResolvedRule(1, factor, each), layout)
            found[each, "key_value", rule.key_value] = rule
    return found


def _watch(
    hooks: ExitStack,
    family: Family,
    module: nn.Module,
    block: nn.Module,
    passes: _Passes,
    candidates: Candidates,
    record: Callable[[_Candidate, float], None],
) -> None:
    """Hook one layer so that ``record`` gets its drifts in the next pass."""
    layer_scale = getattr(block, "ls1", None)

    def before_block(_: nn.Module, args: tuple[Any, ...]) -> None:
        passes.stream = tuple(value for value in args if isinstance(value, Tensor))[:1]

    def scaled(output: Tensor) -> Tensor:
        result = layer_scale(output) if isinstance(layer_scale, nn.Module) else output
        return result.float()

    def after_attention(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        dense = scaled(output)
        # Some blocks take their input in another shape, but with as many numbers.
        stream = () if block is module else passes.stream
        fits = bool(stream) and stream[0].numel() == dense.numel()
        size = _rms(stream[0].float().reshape(dense.shape) + dense) if fits else _rms(dense)
        known = {ResolvedRule(): 0.0}
        for candidate, rule in candidates.items():
            if rule not in known:
                reduced = scaled(
                    family.reduced_forward(module, passes.layout, rule, *args, **kwargs)
                )
                known[rule] = float(_rms(reduced - dense) / size)
            record(candidate, known[rule])

    if block is not module:
        hooks.callback(block.register_forward_pre_hook(before_block).remove)
    hooks.callback(module.register_forward_hook(after_attention, with_kwargs=True).remove)


def _rms(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values) / values.numel() ** 0.5


def _slope(rows: pd.DataFrame, dense: float) -> float:
    """Return the least squares slope through the dense point of a metric over drift."""
    drifts, changes = rows["mean"].to_numpy(), rows["mean_probe"].to_numpy() - dense
    square = float(drifts @ drifts)
    return float(drifts @ changes) / square if square > 0 else 0.0
