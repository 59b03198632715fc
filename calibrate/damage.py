"""What the sensitivities say: damage of each factor, the knapsack's choices, the paper's rule.

Error and consistency of few clips are noisy, and much of what looks like a gain is luck. Deviation
is not, and ranks schedules nearly as well. So each damage by another source is shrunk towards what
deviation lets expect. With d the mean over clips and e its standard error, v the damage by
deviation, and k the least-squares slope of d over v (per axis and operators, not below 0):

    damage = k·v + (d - k·v) · s² / (s² + e²),   s² = mean of (d - k·v)² - e², at least 0

(empirical Bayes; s is how much layers truly differ from the rule). A damage below 0, a gain, counts
only where the one-sided 95 % t interval of d lies below 0. Elsewhere, and where only deviation was
measured, it is k·v, and never less than `LEAST_SLOPE`·v, so that of two reductions of which error
says nothing the more faithful one is preferred. Last, within one layer and axis damage is made not
to fall as the factor grows (isotonic regression).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
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
"""One-sided confidence from which on a gain is believed."""

LEAST_SLOPE = 0.01
"""Damage, at least, of as much deviation."""

FAITHFULNESS = "score.deviation"

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
    own = _differences(table, metric, operators)
    if own.empty:
        raise SensitivityError(f"the sensitivities have no metric '{metric}' for these operators")
    found: dict[Place, float] = {}
    if metric == FAITHFULNESS:
        own["damage"] = own["change"]
    else:
        keys = ["layer", "axis", "factor"]
        deviation = _differences(table, FAITHFULNESS, operators)[[*keys, "change"]]
        # Deviation may be known of factors at which nothing else was measured.
        both = own.merge(deviation, on=keys, how="outer", suffixes=("", "_deviation"))
        own = pd.concat(
            rows.assign(damage=believed(rows)) for _, rows in both.groupby("axis", sort=False)
        )
    for (layer, axis), rows in own.groupby(["layer", "axis"]):
        found[int(layer), str(axis), 1] = 0.0
        ordered = rows[rows["factor"] > 1].sort_values("factor")
        if not ordered.empty:
            rising = isotonic_regression(ordered["damage"].to_numpy()).x
            for factor, damage in zip(ordered["factor"], rising, strict=True):
                found[int(layer), str(axis), int(factor)] = float(damage)
    return found


def believed(rows: pd.DataFrame) -> pd.Series:
    """Return the damages of one axis, shrunk as the head of this file says.

    Args:
        rows: Per layer and factor ``change``, its standard ``error`` over ``clips``, and
            ``change_deviation``; NaN where one or the other is not known.
    """
    change, error, clips = rows["change"], rows["error"], rows["clips"].fillna(1)
    deviation = rows["change_deviation"].fillna(0.0).clip(lower=0.0)
    square = float((deviation * deviation)[change.notna()].sum())
    slope = max(0.0, float((change * deviation).sum()) / square) if square > 0 else 0.0
    expected = slope * deviation
    reduced = rows["factor"] > 1
    spread = float(((change - expected) ** 2 - error**2)[reduced].mean()) if reduced.any() else 0.0
    between = max(0.0, spread)
    trust = between / (between + error**2).where(between + error**2 > 0, 1.0)
    shrunk = (expected + (change - expected) * trust.where(error > 0, 1.0)).fillna(expected)
    quantile = student_t.ppf(GAIN_CONFIDENCE, (clips - 1).clip(lower=1))
    gains = (clips > 1) & (change + quantile * error < 0) & (shrunk < 0)
    harms = shrunk.where(shrunk >= 0, expected).clip(lower=LEAST_SLOPE * deviation)
    return shrunk.where(gains, harms)


def _differences(table: pd.DataFrame, metric: str, operators: Operators) -> pd.DataFrame:
    """Return mean changes from factor 1 with their standard errors, a row per place.

    Raises:
        SensitivityError: If there is nothing at factor 1 to compare with.
    """
    part = table[(table["metric"] == metric) & (table["operators"] == operators_text(operators))]
    dense = part[part["factor"] == 1][["layer", "axis", "mean"]]
    both = part.merge(dense, on=["layer", "axis"], how="left", suffixes=("", "_dense"))
    lacking = both[both["mean_dense"].isna()]
    if not lacking.empty:
        place = (int(lacking["layer"].iloc[0]), str(lacking["axis"].iloc[0]))
        raise SensitivityError(
            f"the sensitivities of {place} were measured around another point than dense: they say "
            "nothing of what a factor does beyond 1"
        )
    return both.assign(
        change=both["mean"] - both["mean_dense"],
        error=both["spread"] / np.sqrt(both["clips"].astype(float)),
    )


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
