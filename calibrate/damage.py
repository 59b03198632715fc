"""What the sensitivities say: damage of each factor, the knapsack's choices, the paper's rule.

Damage is estimated from few clips. Within one layer and axis it is made not to fall as the factor
grows (isotonic regression): a harsher reduction of the same layer does no less harm, and what looks
otherwise is noise. Then a gain, a damage below 0, counts only where it is significant, and only in
part. With d its mean over clips and e the standard error it is ``d · (1 - (e / d)²)`` (James and
Stein's positive part) where the one-sided 95 % t interval of d lies below 0, and 0 otherwise. Harm
counts as measured: that a few clips show none beyond doubt is no evidence that there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from scipy.optimize import isotonic_regression
from scipy.stats import t as student_t

from spark3r.layout import TokenLayout
from spark3r.schedule import LayerRule, Operators

from .knapsack import Choice
from .latency import LatencyModel
from .naming import operators_text
from .sensitivity import SensitivityError

SENSITIVE_RATIO = 1.05
"""Growth of an error above which Spark3R §IV-D calls a layer sensitive."""

PAPER_METRICS = ("error.trajectory", "error.trajectory_step", "error.trajectory_step_deg")
"""The errors of its probe: ATE, and translation and rotation from frame to frame (RPE)."""

GAIN_CONFIDENCE = 0.95
"""One-sided confidence from which on a layer's gain is believed."""

Place = tuple[int, str, int]
"""Layer, axis and factor."""


def damages(table: pd.DataFrame, metric: str, operators: Operators) -> dict[Place, float]:
    """Return what each factor does to a metric beyond factor 1, by layer, axis and factor.

    Args:
        table: From `probe` around the dense model, or `calibrate.drift.scale_drift`.
        metric: Such as ``score.deviation``.
        operators: Which operators.

    Raises:
        SensitivityError: If the table has no such rows, or none at factor 1 to compare with.
    """
    part = table[(table["metric"] == metric) & (table["operators"] == operators_text(operators))]
    if part.empty:
        raise SensitivityError(f"the sensitivities have no metric '{metric}' for these operators")
    found: dict[Place, float] = {}
    for (layer, axis), rows in part.groupby(["layer", "axis"]):
        ordered = rows.sort_values("factor")
        if int(ordered["factor"].iloc[0]) != 1:
            raise SensitivityError(
                f"the sensitivities of {(int(layer), str(axis))} were measured around another "
                "point than dense: they say nothing of what a factor does beyond 1"
            )
        found[int(layer), str(axis), 1] = 0.0
        dense, reduced = ordered.iloc[0], ordered.iloc[1:]
        if reduced.empty:
            continue
        clips = int(reduced["clips"].min())
        error = float(reduced["spread"].mean()) / math.sqrt(clips)  # of every factor: same clips
        rising = isotonic_regression(reduced["mean"].to_numpy() - dense["mean"]).x
        for factor, damage in zip(reduced["factor"], rising, strict=True):
            found[int(layer), str(axis), int(factor)] = believed(float(damage), error, clips)
    return found


def believed(damage: float, error: float, clips: int) -> float:
    """Return a damage, less of it or none where it is a gain; see the head of this file.

    Args:
        damage: Its mean over clips.
        error: The standard error of that mean.
        clips: Number of clips.
    """
    if damage >= 0:
        return damage
    if clips < 2 or damage + float(student_t.ppf(GAIN_CONFIDENCE, clips - 1)) * error >= 0:
        return 0.0
    return damage * (1 - (error / damage) ** 2)


def choices(
    table: pd.DataFrame,
    metric: str,
    operators: Sequence[Operators],
    latency: LatencyModel,
    layout: TokenLayout,
) -> list[list[Choice]]:
    """Return the knapsack's choices: all pairs of measured factors, their damages added.

    Args:
        table: Sensitivities around dense.
        metric: What counts as damage.
        operators: Which operators a layer may choose from.
        latency: Predicts what a layer costs at the target length.
        layout: Token layout there.

    Raises:
        SensitivityError: As `damages`.
    """
    found: dict[int, dict[tuple[int, int, Operators | None], Choice]] = {}
    for each in operators:
        by_factor = damages(table, metric, each)
        for layer in sorted({layer for layer, _, _ in by_factor}):
            queries = _axis(by_factor, layer, "query")
            keys = _axis(by_factor, layer, "key_value")
            for (query, harm_q), (key_value, harm_kv) in (
                (q, k) for q in queries.items() for k in keys.items()
            ):
                rule = LayerRule(query, key_value, each)
                identity = (query, key_value, None if rule.is_dense else each)
                cost_ms = latency.layer_ms(rule, layout)
                choice = Choice(rule, cost_ms, harm_q + harm_kv)
                found.setdefault(layer, {}).setdefault(identity, choice)
    return [list(found[layer].values()) for layer in sorted(found)]


def sensitive_layers(
    table: pd.DataFrame,
    metrics: Sequence[str] = PAPER_METRICS,
    ratio: float = SENSITIVE_RATIO,
) -> tuple[int, ...]:
    """Return the layers that Spark3R §IV-D calls sensitive.

    A layer is sensitive if any of the metrics, at the largest key-value factor of the table, is
    more than ``ratio`` times what it is at the smallest, the operating point.

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


def _axis(damage: Mapping[tuple[int, str, int], float], layer: int, axis: str) -> dict[int, float]:
    """Return the damages of one layer and axis by factor; 0 at factor 1 if it was not measured."""
    measured = {key[2]: harm for key, harm in damage.items() if key[:2] == (layer, axis)}
    return dict(sorted(measured.items())) or {1: 0.0}
