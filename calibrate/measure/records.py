"""Sensitivities as a profile stores them: one record per operators, axis and metric."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from spark3r.profile.evidence import Sensitivity
from spark3r.profile.model import OperatorsRecord
from spark3r.reduction.operators import Operators
from spark3r.schedule import operators_text

from ..clips import Split
from ..defaults import Objective
from .probe import COLUMNS

METRICS = ("score.error", "score.consistency", "score.deviation")
"""Metrics that a profile stores."""


def sensitivity_records(
    table: pd.DataFrame, split: Split, objective: Objective = "balanced"
) -> tuple[Sensitivity, ...]:
    """Return the sensitivities as a profile stores them.

    Args:
        table: Sensitivities from `calibrate.measure.sensitivity.sensitivities`.
        split: Clips by role. The first search clips were probed, drift was measured on the last.
        objective: Metrics that the scores count.
    """
    records = []
    layers = int(table["layer"].max()) + 1
    stored = table[table["metric"].isin(METRICS)]
    keys = ["operators", "axis", "metric"]
    for (operators, axis, metric), rows in stored.groupby(keys, sort=True):
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
                operators=OperatorsRecord.of(Operators.from_dict(json.loads(str(operators)))),
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
    """Return the table that `sensitivity_records` stored. An unknown spread becomes 0.

    Args:
        records: Sensitivities of a profile. Those of another objective are left out.
        objective: Metrics that the scores count.
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
    """Return the name of a score in a profile. It names the objective unless that is balanced."""
    return metric if objective == "balanced" else f"{metric} of {objective}"
