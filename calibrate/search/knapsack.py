"""The multiple-choice knapsack: one choice per layer, least degradation within a budget, exactly.

Costs and degradations add up over layers and may be any real numbers (a degradation below 0 is a
gain). The solver goes through the layers and keeps all partial assignments that no other undercuts
in both cost and degradation. Nothing is rounded, so the answer is exact: sums are float64 sums in
the order of the layers, and an assignment fits if such a sum is at most the bound.

Partial assignments that a Lagrangian bound proves to be no better than a known assignment are
dropped as well. The rest can in theory double with every layer. If more than `MAX_PARTIAL` are
needed, an error says so, and no approximate answer is given. Twenty-four layers of forty choices
need some hundreds.

Two assignments can be equally good. Then the solver returns the one that is better by the other
measure. If they are equal in both, it returns the one whose choice comes earlier in the first layer
in which they differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spark3r.reduction.operators import Operators
from spark3r.schedule import LayerRule, Schedule

MAX_PARTIAL = 4_000_000
"""Most partial assignments after a layer, 32 bytes each (128 MB per layer)."""

_BISECTIONS = 60

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class FrontTooLargeError(ValueError):
    """The exact answer needs more partial assignments than are allowed."""


@dataclass(frozen=True)
class Choice:
    """One way to treat a layer.

    Attributes:
        rule: Factors of the layer, and its operators if they differ from the schedule's.
        cost_ms: Latency of the layer.
        degradation: Harm to quality; infinite for a choice that must not be taken.
    """

    rule: LayerRule
    cost_ms: float
    degradation: float


@dataclass(frozen=True)
class Assignment:
    """One choice per layer.

    Attributes:
        indices: Index of each layer's choice in the layer's list.
        cost_ms: Sum of the costs.
        degradation: Sum of the degradations.
    """

    indices: tuple[int, ...]
    cost_ms: float
    degradation: float

    def schedule(self, layers: Sequence[Sequence[Choice]], operators: Operators) -> Schedule:
        """Return the schedule of this assignment.

        Args:
            layers: The choices of each layer.
            operators: Operators of layers whose choice names none.
        """
        chosen = (layer[index].rule for layer, index in zip(layers, self.indices, strict=True))
        return Schedule(
            tuple(
                replace(rule, operators=None) if rule.operators == operators else rule
                for rule in chosen
            ),
            operators,
        )


def solve(
    layers: Sequence[Sequence[Choice]], budget_ms: float, *, max_partial: int = MAX_PARTIAL
) -> Assignment | None:
    """Return the assignment of least degradation within a budget, None if there is none.

    Args:
        layers: The choices of each layer.
        budget_ms: Largest sum of the costs.
        max_partial: Most partial assignments after a layer, default `MAX_PARTIAL`.

    Raises:
        FrontTooLargeError: If more partial assignments are needed.
        ValueError: If a layer has no choice, a cost is not finite, or a number is NaN.
    """
    return _assignment(layers, _least_value(_options(layers), budget_ms, max_partial))


def solve_cheapest(
    layers: Sequence[Sequence[Choice]], max_degradation: float, *, max_partial: int = MAX_PARTIAL
) -> Assignment | None:
    """Return the assignment of least cost within a degradation, None if there is none.

    Args:
        layers: The choices of each layer.
        max_degradation: Largest sum of the degradations.
        max_partial: Most partial assignments after a layer, default `MAX_PARTIAL`.

    Raises:
        FrontTooLargeError: If more partial assignments are needed.
        ValueError: As `solve`.
    """
    swapped = [_Options(each.value, each.weight, each.choice) for each in _options(layers)]
    return _assignment(layers, _least_value(swapped, max_degradation, max_partial))


class _Options(NamedTuple):
    """The choices of one layer, ``[C]`` each, without those of infinite degradation.

    Attributes:
        weight: Number whose sum is bounded.
        value: Number whose sum is minimised.
        choice: Index in the layer's list.
    """

    weight: Floats
    value: Floats
    choice: Integers


def _options(layers: Sequence[Sequence[Choice]]) -> list[_Options]:
    """Return the choices of each layer, costs being the weights."""
    if not layers:
        raise ValueError("there is no layer to choose for")
    found = []
    for number, layer in enumerate(layers):
        for index, choice in enumerate(layer):
            if not (math.isfinite(choice.cost_ms) and choice.degradation > -math.inf):
                raise ValueError(
                    f"layer {number}, choice {index}: cost {choice.cost_ms} ms and degradation "
                    f"{choice.degradation}, expected a finite cost, and a degradation that is "
                    "finite or inf"
                )
        finite = [place for place, choice in enumerate(layer) if choice.degradation < math.inf]
        if not finite:
            raise ValueError(f"layer {number} has no choice of finite degradation")
        costs = np.array([layer[place].cost_ms for place in finite], float)
        degradations = np.array([layer[place].degradation for place in finite], float)
        found.append(_Options(costs, degradations, np.array(finite, np.int64)))
    return found


def _assignment(
    layers: Sequence[Sequence[Choice]], indices: tuple[int, ...] | None
) -> Assignment | None:
    if indices is None:
        return None
    chosen = [layer[index] for layer, index in zip(layers, indices, strict=True)]
    cost_ms = degradation = 0.0
    for choice in chosen:
        cost_ms += choice.cost_ms
        degradation += choice.degradation
    return Assignment(indices, cost_ms, degradation)


class _Front(NamedTuple):
    """Partial assignments up to one layer, by weight upwards and value downwards.

    Attributes:
        weight: Sums of the weights, ``[F]``.
        value: Sums of the values, ``[F]``.
        parent: Row of the partial assignment one layer earlier, ``[F]``.
        choice: Index of the layer's choice, ``[F]``.
    """

    weight: Floats
    value: Floats
    parent: Integers
    choice: Integers


def _least_value(
    layers: Sequence[_Options], most: float, max_partial: int
) -> tuple[int, ...] | None:
    """Return the indices of least value whose weight is at most ``most``, or None."""
    if math.isnan(most):
        raise ValueError("the bound is NaN, expected a number")
    if _total([each.weight.min() for each in layers]) > most:
        return None
    bound = _bound(layers, most)
    none = np.zeros(1, np.int64)
    front, fronts = _Front(np.zeros(1), np.zeros(1), none, none), []
    order = none  # place of each partial assignment in lexicographic order of the choices
    for number, layer in enumerate(layers):
        weight = (front.weight[:, None] + layer.weight).ravel()
        value = (front.value[:, None] + layer.value).ravel()
        parent = np.repeat(np.arange(len(front.weight)), len(layer.weight))
        option = np.tile(np.arange(len(layer.weight)), len(front.weight))
        rank = order[parent] * len(layer.weight) + option
        kept = np.flatnonzero(bound.keeps(number, weight, value))
        # Of equal weights the least value comes first, of equal both the earliest choices.
        kept = kept[np.lexsort((rank[kept], value[kept], weight[kept]))]
        least_before = np.concatenate(([np.inf], np.minimum.accumulate(value[kept])[:-1]))
        kept = kept[value[kept] < least_before]
        if len(kept) > max_partial:
            raise FrontTooLargeError(
                f"{len(kept)} partial assignments after layer {number}, expected at most "
                f"{max_partial}: offer fewer choices per layer"
            )
        order = np.empty(len(kept), np.int64)
        order[np.argsort(rank[kept], kind="stable")] = np.arange(len(kept))
        front = _Front(weight[kept], value[kept], parent[kept], layer.choice[option[kept]])
        fronts.append(front)
    row = int(np.flatnonzero(front.weight <= most)[-1])
    indices = []
    for front in reversed(fronts):
        indices.append(int(front.choice[row]))
        row = int(front.parent[row])
    return tuple(reversed(indices))


class _Bound(NamedTuple):
    """A Lagrangian bound on the value of what a partial assignment can become.

    Attributes:
        most: Largest weight allowed.
        best: Value of a known assignment that is allowed.
        price: Lagrange multiplier of the weight.
        rest_weight: Least weight of the layers that follow each layer, ``[L]``.
        rest_value: Least ``value + price * weight`` of the layers that follow, ``[L]``.
        slack: Rounding error of the comparisons.
    """

    most: float
    best: float
    price: float
    rest_weight: list[float]
    rest_value: list[float]
    slack: float

    def keeps(self, layer: int, weight: Floats, value: Floats) -> npt.NDArray[np.bool_]:
        """Return which partial assignments up to ``layer`` may become the best."""
        fits = weight + self.rest_weight[layer] <= self.most + self.slack
        least = value + self.price * (weight - self.most) + self.rest_value[layer]
        return fits & (least <= self.best + self.slack)


def _bound(layers: Sequence[_Options], most: float) -> _Bound:
    """Return the bound at the lowest price at which the best assignment for the price is allowed.

    The price is found by bisection. Any price gives a correct bound, this one a tight bound.
    """
    low, high, price = 0.0, math.inf, 0.0
    best = [int(np.lexsort((each.value, each.weight))[0]) for each in layers]  # the lightest
    for _ in range(_BISECTIONS):
        chosen = [int((each.value + price * each.weight).argmin()) for each in layers]
        if _total([each.weight[i] for each, i in zip(layers, chosen, strict=True)]) > most:
            low = price
        else:
            high, best = price, chosen
        if high == 0:
            break
        price = (low + high) / 2 if high < math.inf else max(1.0, 2 * low)
    price = high if high < math.inf else low
    weights = [float(np.abs(each.weight).max()) for each in layers]
    most = min(most, sum(weights))
    scale = (abs(most) + sum(weights)) * (1 + price)
    scale += sum(float(np.abs(each.value).max()) for each in layers)
    return _Bound(
        most=most,
        best=_total([each.value[i] for each, i in zip(layers, best, strict=True)]),
        price=price,
        rest_weight=_after([float(each.weight.min()) for each in layers]),
        rest_value=_after([float((each.value + price * each.weight).min()) for each in layers]),
        slack=1e-12 * scale,
    )


def _total(terms: Sequence[float]) -> float:
    """Return the sum in the order of the layers, as fronts add up."""
    total = 0.0
    for term in terms:
        total += float(term)
    return total


def _after(terms: Sequence[float]) -> list[float]:
    """Return, for each layer, the sum over the layers that follow it."""
    return [math.fsum(terms[layer + 1 :]) for layer in range(len(terms))]
