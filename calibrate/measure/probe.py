"""Sensitivity of layers, measured end to end, one layer at a time.

All layers run at an operating point, and one layer's query or key-value factor is changed. The
result is one table (`COLUMNS`) with a row per operators, layer, axis, factor and metric. ``mean``
is the metric's mean over clips, ``spread`` the standard deviation over clips of its paired
difference from the operating point. Each layer also has rows for the operating factor, so that the
effect of a factor is the difference of two means of one layer and axis. Metrics are all figures of
`.quality`, and the scores of `.score` with names such as ``score.error``.

The paper's probe has ``operating_point=(1, 32)``, ``key_value_factors=(256,)`` and the paper's
operators. `sensitive_layers` applies the paper's rule to the table.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from spark3r.errors import Spark3rError
from spark3r.prediction import PredictionError
from spark3r.reduction.operators import Operators
from spark3r.reduction.rule import ResolvedRule, clamp
from spark3r.runner import Runner
from spark3r.schedule import Schedule, operators_text

from ..defaults import SOURCES, Objective
from ..progress import Progress, no_progress
from .evaluator import DenseRuns, evaluate
from .quality import Quality
from .score import score

COLUMNS = ("profiler", "operators", "layer", "axis", "factor", "metric", "mean", "spread", "clips")

SENSITIVE_RATIO = 1.05
"""Growth of an error above which Spark3R §IV-D calls a layer sensitive."""

PAPER_METRICS = ("error.trajectory", "error.trajectory_step", "error.trajectory_step_deg")
"""Errors of the paper's probe: ATE, and translation and rotation from frame to frame (RPE)."""

FAITHFULNESS = "score.deviation"
"""Metric that degradations are taken from."""


class SensitivityError(Spark3rError):
    """A probe failed, with its layer and factor, or a table of sensitivities lacks something."""


def probe(
    runner: Runner,
    dense: DenseRuns,
    operators: Sequence[Operators],
    *,
    query_factors: Sequence[int] = (),
    key_value_factors: Sequence[int] = (),
    operating_point: tuple[int, int] = (1, 1),
    layers: Iterable[int] | None = None,
    objective: Objective = "balanced",
    progress: Progress = no_progress,
) -> pd.DataFrame:
    """Measure sensitivities end to end.

    Factors are brought down to the largest that a clip allows, like in the runtime.

    Args:
        runner: An unpatched model.
        dense: The clips and their dense runs.
        operators: Operators to probe with.
        query_factors: Query factors to try.
        key_value_factors: Key-value factors to try.
        operating_point: Query and key-value factor of all other layers.
        layers: Layers to probe; None for all.
        objective: Metrics that the scores count.
        progress: Callback(schedules run, their total).

    Returns:
        The table. Its profiler is ``probe``.

    Raises:
        SensitivityError: If a run gives NaN or no prediction. The message names layer and factor.
    """
    names = list(runner.attention)
    shortest = min(dense.clips, key=lambda clip: clip.frames)
    layout = runner.layout(shortest.images)
    chosen = range(len(names)) if layers is None else tuple(layers)
    axes = (("query", query_factors), ("key_value", key_value_factors))
    points = {each: clamp(ResolvedRule(*operating_point, each), layout) for each in operators}
    plan: list[tuple[Operators, int, str, list[int]]] = []
    for each, point in points.items():
        for layer in chosen:
            for axis, factors in axes:
                rules = [clamp(ResolvedRule(operators=each, **{axis: f}), layout) for f in factors]
                tried = {getattr(rule, axis) for rule in rules} - {getattr(point, axis)}
                if tried:
                    plan.append((each, layer, axis, sorted(tried)))
    total, done = sum(len(factors) for *_, factors in plan), 0
    progress(0, total)
    runs = _Runs(runner, dense)
    rows: list[dict[str, Any]] = []
    for each, layer, axis, factors in plan:
        point = points[each]
        base = Schedule.uniform(len(names), point.query, point.key_value, operators=each)
        reference = runs.quality(base, f"all layers at factors {point.query}/{point.key_value}")
        place = (each, layer, axis, getattr(point, axis))
        rows += _rows(place, reference, reference, dense, objective)
        for factor in factors:
            change: dict[str, Any] = {axis: factor}
            changed = list(base.layers)
            changed[layer] = replace(changed[layer], **change)
            name = f"layer {layer} ({names[layer]}), {axis} factor {factor}"
            found = runs.quality(replace(base, layers=tuple(changed)), name)
            rows += _rows((each, layer, axis, factor), found, reference, dense, objective)
            done += 1
            progress(done, total)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def scores_and_figures(
    qualities: Sequence[Quality], dense: DenseRuns, objective: Objective
) -> dict[str, list[float]]:
    """Return every metric that all clips have, by clip: figures, and ``score.`` of each source."""
    tables = [quality.figures() for quality in qualities]
    for table, quality, reference in zip(tables, qualities, dense.qualities, strict=True):
        for source in SOURCES:
            if source != "error" or quality.error is not None:
                table[f"score.{source}"] = score(quality, reference, source, objective)
    names = [name for name in tables[0] if all(name in table for table in tables)]
    return {name: [table[name] for table in tables] for name in names}


class _Runs:
    """Qualities of schedules. Schedules with the same effect run once."""

    def __init__(self, runner: Runner, dense: DenseRuns) -> None:
        self._runner, self._dense = runner, dense
        self._known: dict[object, tuple[Quality, ...]] = {}

    def quality(self, schedule: Schedule, what: str) -> tuple[Quality, ...]:
        key = tuple(rule.resolve(schedule.operators) for rule in schedule.layers)
        if all(rule.is_dense for rule in schedule.layers):
            return self._dense.qualities
        if key not in self._known:
            try:
                self._known[key] = evaluate(self._runner, schedule, self._dense)
            except PredictionError as error:
                raise SensitivityError(f"{what}: {error}") from error
        return self._known[key]


def _rows(
    place: tuple[Operators, int, str, int],
    found: Sequence[Quality],
    reference: Sequence[Quality],
    dense: DenseRuns,
    objective: Objective,
) -> list[dict[str, Any]]:
    operators, layer, axis, factor = place
    before = scores_and_figures(reference, dense, objective)
    rows = []
    for metric, values in scores_and_figures(found, dense, objective).items():
        if metric not in before:
            continue
        changes = [value - old for value, old in zip(values, before[metric], strict=True)]
        rows.append(
            {
                "profiler": "probe",
                "operators": operators_text(operators),
                "layer": layer,
                "axis": axis,
                "factor": factor,
                "metric": metric,
                "mean": statistics.fmean(values),
                "spread": statistics.stdev(changes) if len(changes) > 1 else 0.0,
                "clips": len(values),
            }
        )
    return rows


def sensitive_layers(
    table: pd.DataFrame,
    metrics: Sequence[str] = PAPER_METRICS,
    ratio: float = SENSITIVE_RATIO,
) -> tuple[int, ...]:
    """Return the layers that are sensitive by the rule of Spark3R §IV-D.

    A layer is sensitive if any of the metrics at the largest key-value factor of the table is more
    than ``ratio`` times as large as at the smallest, the operating point.

    Raises:
        SensitivityError: If the table has none of the metrics on the key-value axis.
    """
    part = table[(table["axis"] == "key_value") & table["metric"].isin(metrics)]
    if part.empty:
        raise SensitivityError(f"the sensitivities have none of {', '.join(metrics)}")
    found = set()
    for (layer, _), rows in part.groupby(["layer", "metric"]):
        ordered = rows.sort_values("factor")["mean"]
        if float(ordered.iloc[-1]) > ratio * float(ordered.iloc[0]):
            found.add(int(layer))
    return tuple(sorted(found))
