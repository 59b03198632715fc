"""Choices of the knapsack, with their cost and degradation, from latencies and sensitivities.

The degradation of a factor is its deviation from dense, whatever schedules are judged by in the
end. Error on a few clips is noisy, and much of what looks like a gain is luck. Deviation is not,
and a knapsack over it finds schedules of less error than one over error itself
(docs/method/search.md).

Within one layer and axis the degradation is made not to fall as the factor grows (isotonic
regression), and is interpolated linearly in the logarithm of the factor. Layers and axes deviate in
different directions, so their joint deviation is nearer the root of the sum of squares than the
sum. The knapsack therefore adds up degradations to the power of `POWER`. (A plain sum makes it
reduce a few layers as far as possible.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from spark3r.latency import LatencyModel
from spark3r.layout import TokenLayout
from spark3r.reduction.operators import Operators
from spark3r.reduction.rule import ResolvedRule
from spark3r.schedule import LayerRule, operators_text

from ..defaults import OFFERED, POWER
from ..measure.probe import FAITHFULNESS, SensitivityError
from .knapsack import Choice

REVISION = 10
"""Raised whenever the same sensitivities lead to other choices, so that earlier searches are not
continued."""

LayerFactor = tuple[int, str, int]
"""Layer, axis and factor."""


def degradations(table: pd.DataFrame, operators: Operators) -> dict[LayerFactor, float]:
    """Return the degradation of each layer, axis and factor under some operators.

    Raises:
        SensitivityError: If the table has no deviation for these operators, or none at factor 1.
    """
    own = _changes(table, operators)
    if own.empty:
        raise SensitivityError(
            f"the sensitivities have no metric '{FAITHFULNESS}' for these operators"
        )
    found: dict[LayerFactor, float] = {}
    for (layer, axis), rows in own.groupby(["layer", "axis"]):
        found[int(layer), str(axis), 1] = 0.0
        ordered = rows[rows["factor"] > 1].sort_values("factor")
        if not ordered.empty:
            rising = isotonic_regression(ordered["change"].to_numpy()).x
            for factor, change in zip(ordered["factor"], rising, strict=True):
                found[int(layer), str(axis), int(factor)] = max(0.0, float(change))
    return found


def _changes(table: pd.DataFrame, operators: Operators) -> pd.DataFrame:
    """Return the mean change of deviation from factor 1, a row per layer, axis and factor.

    Raises:
        SensitivityError: If there is no factor 1 to compare with.
    """
    own = table["operators"] == operators_text(operators)
    part = table[(table["metric"] == FAITHFULNESS) & own]
    dense = part[part["factor"] == 1][["layer", "axis", "mean"]]
    both = part.merge(dense, on=["layer", "axis"], how="left", suffixes=("", "_dense"))
    lacking = both[both["mean_dense"].isna()]
    if not lacking.empty:
        layer, axis = int(lacking["layer"].iloc[0]), str(lacking["axis"].iloc[0])
        raise SensitivityError(
            f"the sensitivities of layer {layer} on the {axis} axis have no row of factor 1 to "
            "compare with; measure them anew (another --cache folder, or none)"
        )
    return both.assign(change=both["mean"] - both["mean_dense"])


def choices(
    table: pd.DataFrame,
    operators: Sequence[Operators],
    latency: LatencyModel,
    layout: TokenLayout,
    *,
    offered: Sequence[int] = OFFERED,
    power: float = POWER,
) -> list[list[Choice]]:
    """Return the choices of each layer: all pairs of factors, with all operators.

    The degradation of a choice is the sum over its two axes of the degradation to the power.

    Args:
        table: Sensitivities around the dense model.
        operators: Operators that a layer may choose from.
        latency: Latency model, for the cost of a choice.
        layout: Token layout at the target length.
        offered: Factors offered besides the measured ones, default `OFFERED`.
        power: Power to which degradations are added up, default `POWER`.

    Raises:
        SensitivityError: As `degradations`.
    """
    found: dict[int, dict[ResolvedRule, Choice]] = {}
    for each in operators:
        by_factor = degradations(table, each)
        for layer in sorted({layer for layer, _, _ in by_factor}):
            queries = _axis(by_factor, layer, "query", offered)
            keys = _axis(by_factor, layer, "key_value", offered)
            for query, key_value in product(queries, keys):
                rule = LayerRule(query, key_value, each)
                resolved = rule.resolve(each)
                cost_ms = latency.layer_ms(resolved, layout)
                choice = Choice(rule, cost_ms, queries[query] ** power + keys[key_value] ** power)
                found.setdefault(layer, {}).setdefault(resolved, choice)
    return [list(found[layer].values()) for layer in sorted(found)]


def _axis(
    by_factor: Mapping[LayerFactor, float], layer: int, axis: str, offered: Sequence[int]
) -> dict[int, float]:
    """Return the degradations of one layer and axis by factor, only factor 1 if unmeasured."""
    measured = sorted(
        (factor, each) for (*at, factor), each in by_factor.items() if at == [layer, axis]
    )
    if not measured:
        return {1: 0.0}
    known, values = zip(*measured, strict=True)
    factors = sorted({*known, *(each for each in offered if each < known[-1])})
    between = np.interp(np.log(factors), np.log(known), values)
    return dict(zip(factors, map(float, between), strict=True))
