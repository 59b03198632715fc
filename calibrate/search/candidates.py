"""What the sensitivities say: damage of each factor, the knapsack's choices, the paper's rule.

Damage is deviation from dense, whatever schedules are judged by in the end. Error of a few clips is
noisy, and much of what looks like a gain is luck; deviation is not, and a knapsack over it finds
schedules of less error than one over error itself (docs/method/search.md).

Within one layer and axis it is made not to fall as the factor grows (isotonic regression), and is
taken to be linear in the logarithm of the factor between those measured. Layers and axes deviate in
different directions, so that what they do together is nearer the root of the sum of squares than
the sum: the knapsack adds up damages to the power of `POWER`. (A mere sum makes it reduce a few
layers to the utmost.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from spark3r.layout import TokenLayout
from spark3r.reduction.operators import Operators
from spark3r.reduction.rule import ResolvedRule
from spark3r.schedule import LayerRule, operators_text

from ..defaults import OFFERED, POWER
from ..measure.latency_model import LatencyModel
from ..measure.probe import FAITHFULNESS, SensitivityError
from .knapsack import Choice

REVISION = 8
"""Raised whenever the same sensitivities come to other choices; earlier searches stay apart."""

Place = tuple[int, str, int]
"""Layer, axis and factor."""


def damages(table: pd.DataFrame, operators: Operators) -> dict[Place, float]:
    """Return the deviation of each factor by layer, axis and factor.

    Args:
        table: From `probe` around the dense model, or `residual_drift.scale_drift`.
        operators: Which operators.

    Raises:
        SensitivityError: If the table has no such rows, or none at factor 1 to compare with.
    """
    own = _differences(table, operators)
    if own.empty:
        raise SensitivityError(
            f"the sensitivities have no metric '{FAITHFULNESS}' for these operators"
        )
    found: dict[Place, float] = {}
    for (layer, axis), rows in own.groupby(["layer", "axis"]):
        found[int(layer), str(axis), 1] = 0.0
        ordered = rows[rows["factor"] > 1].sort_values("factor")
        if not ordered.empty:
            rising = isotonic_regression(ordered["change"].to_numpy()).x
            for factor, damage in zip(ordered["factor"], rising, strict=True):
                found[int(layer), str(axis), int(factor)] = max(0.0, float(damage))
    return found


def _differences(table: pd.DataFrame, operators: Operators) -> pd.DataFrame:
    """Return mean changes of deviation from factor 1, a row per place.

    Raises:
        SensitivityError: If there is nothing at factor 1 to compare with.
    """
    own = table["operators"] == operators_text(operators)
    part = table[(table["metric"] == FAITHFULNESS) & own]
    dense = part[part["factor"] == 1][["layer", "axis", "mean"]]
    both = part.merge(dense, on=["layer", "axis"], how="left", suffixes=("", "_dense"))
    lacking = both[both["mean_dense"].isna()]
    if not lacking.empty:
        place = (int(lacking["layer"].iloc[0]), str(lacking["axis"].iloc[0]))
        raise SensitivityError(
            f"the sensitivities of {place} were measured around another point than dense: they say "
            "nothing of what a factor does beyond 1"
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
    """Return the knapsack's choices: all pairs of factors that are `OFFERED`.

    The damage of a choice is that of its two axes, each to the power of `POWER`.

    Args:
        table: Sensitivities around dense.
        operators: Which operators a layer may choose from.
        latency: Predicts what a layer costs at the target length.
        layout: Token layout there.
        offered: Factors offered besides the measured ones.
        power: Power to which damages are added up.

    Raises:
        SensitivityError: As `damages`.
    """
    found: dict[int, dict[ResolvedRule, Choice]] = {}
    for each in operators:
        by_factor = damages(table, each)
        for layer in sorted({layer for layer, _, _ in by_factor}):
            queries = _axis(by_factor, layer, "query", offered)
            keys = _axis(by_factor, layer, "key_value", offered)
            for (query, harm_q), (key_value, harm_kv) in (
                (q, k) for q in queries.items() for k in keys.items()
            ):
                rule = LayerRule(query, key_value, each)
                resolved = rule.resolve(each)
                cost_ms = latency.layer_ms(resolved, layout)
                choice = Choice(rule, cost_ms, harm_q**power + harm_kv**power)
                found.setdefault(layer, {}).setdefault(resolved, choice)
    return [list(found[layer].values()) for layer in sorted(found)]


def _axis(
    damage: Mapping[Place, float], layer: int, axis: str, offered: Sequence[int]
) -> dict[int, float]:
    """Return the damages of one layer and axis by factor; 0 at factor 1 if it was not measured."""
    measured = sorted((key[2], harm) for key, harm in damage.items() if key[:2] == (layer, axis))
    if not measured:
        return {1: 0.0}
    known, harms = zip(*measured, strict=True)
    factors = sorted({*known, *(each for each in offered if each < known[-1])})
    between = np.interp(np.log(factors), np.log(known), harms)
    return dict(zip(factors, map(float, between), strict=True))
