"""Sensitivities and figures of quality as a profile keeps them, there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import pandas as pd

from spark3r.metrics import ConsistencyMetrics
from spark3r.profile.evidence import Figures, Sensitivity
from spark3r.profile.sections import OperatorsRecord
from spark3r.schedule import Operators

from .naming import operators_text
from .objective import Objective
from .quality import Distances, Quality
from .sensitivity import COLUMNS
from .splits import Split

METRICS = ("score.error", "score.consistency", "score.deviation")
"""Metrics that a profile keeps."""


def sensitivity_records(
    table: pd.DataFrame, split: Split, objective: Objective = "balanced"
) -> tuple[Sensitivity, ...]:
    """Return the sensitivities as a profile keeps them.

    Args:
        table: From `calibrate.profiling.sensitivities`.
        split: Clips by role; the first of the search were probed, drift is of the last.
        objective: Which metrics the scores count.
    """
    records = []
    layers = int(table["layer"].max()) + 1
    kept = table[table["metric"].isin(METRICS)]
    for (operators, axis, metric), rows in kept.groupby(["operators", "axis", "metric"], sort=True):
        factors = sorted({int(factor) for factor in rows["factor"]})
        drifted, count = (rows["profiler"] == "drift").all(), int(rows["clips"].max())
        clips = split.search[-count:] if drifted else split.search[:count]

        def by_layer(
            column: str, rows: pd.DataFrame = rows, factors: Sequence[int] = factors
        ) -> tuple[tuple[float | None, ...], ...]:
            places = zip(rows["layer"], rows["factor"], rows[column], strict=True)
            values = {(int(layer), int(factor)): float(value) for layer, factor, value in places}
            return tuple(
                tuple(values.get((layer, factor)) for factor in factors) for layer in range(layers)
            )

        records.append(
            Sensitivity(
                axis="query" if axis == "query" else "key_value",
                profiler="drift" if drifted else "probe",
                metric=_metric_name(str(metric), objective),
                clips=tuple(clip.name for clip in clips),
                frames=min(clip.frames for clip in clips),
                operators=OperatorsRecord.of(Operators(**json.loads(str(operators)))),
                operating_point=(1, 1),
                factors=tuple(factors),
                values=by_layer("mean"),
                spreads=by_layer("spread"),
            )
        )
    return tuple(records)


def sensitivity_table(
    records: Sequence[Sensitivity], objective: Objective = "balanced"
) -> pd.DataFrame:
    """Return the table that `sensitivity_records` kept; where a spread is unknown it is 0.

    Args:
        records: Of a profile; those of another objective are left out.
        objective: Which metrics the scores count.
    """
    metrics = {_metric_name(metric, objective): metric for metric in METRICS}
    rows: list[dict[str, Any]] = []
    for record in records:
        if record.metric not in metrics:
            continue
        for layer, values in enumerate(record.values):
            spreads = record.spreads[layer] if record.spreads else (None,) * len(values)
            for factor, value, spread in zip(record.factors, values, spreads, strict=True):
                if value is None:
                    continue
                rows.append(
                    {
                        "profiler": record.profiler,
                        "operators": operators_text(record.operators.operators()),
                        "layer": layer,
                        "axis": record.axis,
                        "factor": factor,
                        "metric": metrics[record.metric],
                        "mean": value,
                        "spread": spread or 0.0,
                        "clips": len(record.clips),
                    }
                )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _metric_name(metric: str, objective: Objective) -> str:
    """Return what a profile calls a score: which metrics it counts, unless all as usual."""
    return metric if objective == "balanced" else f"{metric} of {objective}"


def figure_records(qualities: Sequence[Quality]) -> tuple[Figures, ...]:
    """Return the quality of a run, clip by clip, as a profile keeps it."""
    records = []
    for quality in qualities:
        sources: dict[str, dict[str, float]] = {}
        for name, value in quality.figures().items():
            source, _, metric = name.partition(".")
            sources.setdefault(source, {})[metric] = value
        records.append(
            Figures(
                clip=quality.clip,
                deviation=sources.get("deviation"),
                error=sources.get("error"),
                consistency=sources.get("consistency"),
            )
        )
    return tuple(records)


def recorded_quality(figures: Figures) -> Quality | None:
    """Return the quality that `figure_records` kept, None where figures are lacking."""
    try:
        return Quality(
            figures.clip,
            None if figures.error is None else _distances(figures.error),
            _consistency(figures.consistency or {}),
            _distances(figures.deviation or {}),
        )
    except KeyError:
        return None


def _distances(table: Mapping[str, float]) -> Distances:
    values: dict[str, Any] = {
        each.name: table.get(each.name) if "None" in str(each.type) else table[each.name]
        for each in fields(Distances)
        if each.name != "is_pan"
    }
    return Distances(**values, is_pan="trajectory" not in table)


def _consistency(table: Mapping[str, float]) -> ConsistencyMetrics:
    return ConsistencyMetrics(
        log_ratio=table.get("log_ratio"),
        visible=table["visible"],
        pairs=int(table["pairs"]),
        camera_spread=table["camera_spread"],
        rotation_spread_deg=table["rotation_spread_deg"],
        depth_spread=table["depth_spread"],
    )
