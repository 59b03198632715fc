"""What the sensitivities say: damage of each factor, the knapsack's choices, the paper's rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from spark3r.layout import TokenLayout
from spark3r.schedule import LayerRule, Operators

from .knapsack import Choice
from .latency import LatencyModel
from .sensitivity import SensitivityError, operators_text

SENSITIVE_RATIO = 1.05
"""Growth of an error above which Spark3R §IV-D calls a layer sensitive."""

PAPER_METRICS = ("error.trajectory", "error.trajectory_step", "error.trajectory_step_deg")
"""The errors of its probe: ATE, and translation and rotation from frame to frame (RPE)."""


def damages(
    table: pd.DataFrame, metric: str, operators: Operators
) -> dict[tuple[int, str, int], float]:
    """Return what each factor does to a metric beyond factor 1, by layer, axis and factor.

    Args:
        table: From `probe` around the dense model, or `calibrate.drift.scale_drift`.
        metric: Such as ``score.deviation``.
        operators: Which operators.

    Raises:
        SensitivityError: If the table has no such rows, or none at factor 1 to compare with.
    """
    part = table[(table["metric"] == metric) & (table["operators"] == operators_text(operators))]
    columns = (part["layer"], part["axis"], part["factor"], part["mean"])
    means = {
        (int(layer), str(axis), int(factor)): float(mean)
        for layer, axis, factor, mean in zip(*columns, strict=True)
    }
    if not means:
        raise SensitivityError(f"the sensitivities have no metric '{metric}' for these operators")
    lacking = sorted({key[:2] for key in means if (*key[:2], 1) not in means})
    if lacking:
        raise SensitivityError(
            f"the sensitivities of {lacking[0]} were measured around another point than dense: "
            "they say nothing of what a factor does beyond 1"
        )
    return {key: value - means[(*key[:2], 1)] for key, value in means.items()}


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
