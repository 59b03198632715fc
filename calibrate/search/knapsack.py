"""The multiple-choice knapsack: one choice per layer, least damage within a budget, exactly.

Costs and damages add up over layers and may be any real numbers (damage below 0 is a gain). The
solver goes through the layers and keeps, of all partial selections, those that no other undercuts
in both cost and damage. Nothing is rounded or bucketed, so the answer is exact: sums are float64
sums in the order of the layers, and a selection fits when such a sum is at most the bound.

Partial selections that a Lagrangian bound proves to be no better than a selection already at hand
are dropped too. What is left can, in theory, double with every layer; should more than
`MAX_PARTIAL` partial selections be needed, an error says so, and no approximate answer is given.
Twenty-four layers of forty choices need some thousands.

Of equally good selections the one is returned that is better by the other measure, and of those
equal in both the one with the earlier choice in the first layer in which they differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from spark3r.reduction.operators import Operators
from spark3r.schedule import LayerRule, Schedule

__all__ = [
    "MAX_PARTIAL",
    "Choice",
    "FrontTooLargeError",
    "Selection",
    "solve",
    "solve_cheapest",
]


@dataclass(frozen=True)
class Choice:
    """One way to treat a layer.

    Attributes:
        rule: Its factors, and its operators where they differ from the schedule's.
        cost_ms: Latency of the layer.
        damage: What it does to quality; infinite where it is out of the question.
    """

    rule: LayerRule
    cost_ms: float
    damage: float


@dataclass(frozen=True)
class Selection:
    """One choice per layer.

    Attributes:
        indices: The choice of each layer, by its place in the layer's list.
        cost_ms: Sum of the costs.
        damage: Sum of the damages.
    """

    indices: tuple[int, ...]
    cost_ms: float
    damage: float

    def schedule(self, layers: Sequence[Sequence[Choice]], operators: Operators) -> Schedule:
        """Return the schedule of this selection.

        Args:
            layers: What was chosen from.
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


def solve(layers: Sequence[Sequence[Choice]], budget_ms: float) -> Selection | None:
    """Return the selection of least damage that costs at most ``budget_ms``; None if none does.

    Raises:
        ValueError: If a layer has no choice, a cost is not finite, or a number is NaN.
    """
    table = _Table.of(layers)
    found = least_value(table.cost, table.damage, table.place, budget_ms)
    return None if found is None else _selection(layers, found)


def solve_cheapest(layers: Sequence[Sequence[Choice]], max_damage: float) -> Selection | None:
    """Return the selection of least cost that does at most ``max_damage``; None if none does.

    Raises:
        ValueError: As `solve`.
    """
    table = _Table.of(layers)
    found = least_value(table.damage, table.cost, table.place, max_damage)
    return None if found is None else _selection(layers, found)


@dataclass(frozen=True)
class _Table:
    """Per layer the choices worth considering: cost, damage and place in the layer's list."""

    cost: list[Floats]
    damage: list[Floats]
    place: list[Integers]

    @classmethod
    def of(cls, layers: Sequence[Sequence[Choice]]) -> _Table:
        if not layers:
            raise ValueError("there is no layer to choose for")
        table = cls([], [], [])
        for index, layer in enumerate(layers):
            for place, choice in enumerate(layer):
                if math.isfinite(choice.cost_ms) and choice.damage > -math.inf:
                    continue
                raise ValueError(
                    f"layer {index}, choice {place}: cost {choice.cost_ms} ms and damage "
                    f"{choice.damage}, expected a finite cost, and a damage that is finite or inf"
                )
            places = [place for place, choice in enumerate(layer) if choice.damage < math.inf]
            if not places:
                raise ValueError(f"layer {index} has no choice of finite damage")
            table.cost.append(np.array([layer[place].cost_ms for place in places], float))
            table.damage.append(np.array([layer[place].damage for place in places], float))
            table.place.append(np.array(places, np.int64))
        return table


def _selection(layers: Sequence[Sequence[Choice]], indices: tuple[int, ...]) -> Selection:
    cost = damage = 0.0
    for layer, index in zip(layers, indices, strict=True):
        cost += layer[index].cost_ms
        damage += layer[index].damage
    return Selection(indices, cost, damage)


MAX_PARTIAL = 4_000_000
"""Most partial selections held after a layer, each 32 bytes (128 MB a layer at most)."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class FrontTooLargeError(ValueError):
    """What the exact answer needs does not fit."""


@dataclass(frozen=True)
class Step:
    """Partial selections up to one layer, by weight upwards and value downwards.

    Attributes:
        weight: What is bounded, summed, ``[F]``.
        value: What is minimised, summed, ``[F]``.
        parent: Row of the partial selection one layer earlier, ``[F]``.
        place: The layer's choice, ``[F]``.
    """

    weight: Floats
    value: Floats
    parent: Integers
    place: Integers


@dataclass(frozen=True)
class Bound:
    """What may be dropped in a search for one best selection.

    Attributes:
        most: Largest weight allowed.
        best: Value of a selection at hand.
        price: Lagrange multiplier of the weight.
        rest_weight: Least weight of the layers that follow each layer, ``[L]``.
        rest_value: Least ``value + price * weight`` of the layers that follow, ``[L]``.
        slack: Rounding error that the tests must bear.
    """

    most: float
    best: float
    price: float
    rest_weight: list[float]
    rest_value: list[float]
    slack: float

    def keeps(self, layer: int, weight: Floats, value: Floats) -> npt.NDArray[np.bool_]:
        """Return which partial selections up to ``layer`` may become the best."""
        fits = weight + self.rest_weight[layer] <= self.most + self.slack
        least = value + self.price * (weight - self.most) + self.rest_value[layer]
        return fits & (least <= self.best + self.slack)


def least_value(
    weights: list[Floats], values: list[Floats], places: list[Integers], most: float
) -> tuple[int, ...] | None:
    """Return the selection of least value whose weight is at most ``most``, or None."""
    if math.isnan(most):
        raise ValueError("the bound is NaN, expected a number")
    if _total(weights, [int(weight.argmin()) for weight in weights]) > most:
        return None
    steps = sweep(weights, values, places, _bound(weights, values, most))
    fitting = np.flatnonzero(steps[-1].weight <= most)
    return trace(steps, int(fitting[-1]))


def sweep(
    weights: list[Floats], values: list[Floats], places: list[Integers], bound: Bound
) -> list[Step]:
    """Return the fronts of partial selections after each layer, as far as the bound keeps them."""
    zero, none = np.zeros(1), np.zeros(1, np.int64)
    step = Step(zero, zero, none, none)
    order = none  # place of each partial selection among them in lexicographic order
    steps = []
    for layer, (weight, value, place) in enumerate(zip(weights, values, places, strict=True)):
        new_weight = (step.weight[:, None] + weight).ravel()
        new_value = (step.value[:, None] + value).ravel()
        parent = np.repeat(np.arange(len(step.weight)), len(weight))
        chosen = np.tile(np.arange(len(weight)), len(step.weight))
        rank = order[parent] * len(weight) + chosen
        kept = np.flatnonzero(bound.keeps(layer, new_weight, new_value))
        # Of equal weights the least value comes first, of equal both the earliest choices.
        kept = kept[np.lexsort((rank[kept], new_value[kept], new_weight[kept]))]
        front = new_value[kept]
        before = np.concatenate(([np.inf], np.minimum.accumulate(front)[:-1]))
        kept = kept[front < before]
        if len(kept) > MAX_PARTIAL:
            raise FrontTooLargeError(
                f"{len(kept)} partial selections after layer {layer}, at most {MAX_PARTIAL} are "
                "held: offer fewer choices per layer"
            )
        order = np.empty(len(kept), np.int64)
        order[np.argsort(rank[kept], kind="stable")] = np.arange(len(kept))
        step = Step(new_weight[kept], new_value[kept], parent[kept], place[chosen[kept]])
        steps.append(step)
    return steps


def _bound(weights: list[Floats], values: list[Floats], most: float) -> Bound:
    """Return the bound of the problem's linear relaxation, and a selection to begin with.

    The relaxation is solved by the greedy way: each layer starts with its lightest choice, and
    steps along the layers' convex hulls are taken by falling gain per weight.
    """
    lightest = [int(np.lexsort((v, w))[0]) for w, v in zip(weights, values, strict=True)]
    moves: list[tuple[float, int, float, int]] = []
    for layer, (layer_weight, layer_value) in enumerate(zip(weights, values, strict=True)):
        for i, j in pairwise(_hull(layer_weight, layer_value)):
            added = float(layer_weight[j] - layer_weight[i])
            gain = float(layer_value[i] - layer_value[j])
            moves.append((-gain / added, layer, added, j))
    price = 0.0
    chosen, full = list(lightest), set[int]()
    weight = _total(weights, chosen)
    # The slopes of a layer rise along its hull; where rounding makes them equal, the order stays.
    for slope, layer, added, j in sorted(moves, key=lambda move: move[:2]):
        if layer in full:
            continue
        if weight + added <= most:
            weight += added
            chosen[layer] = j
            continue
        if not full:
            price = -slope
        full.add(layer)
    if _total(weights, chosen) > most:  # by rounding
        chosen = lightest
    reduced = [float((v + price * w).min()) for w, v in zip(weights, values, strict=True)]
    least = [float(w.min()) for w in weights]
    if most == math.inf:
        most = sum(float(w.max()) for w in weights)
    weight_size = abs(most) + sum(float(np.abs(w).max()) for w in weights)
    value_size = sum(float(np.abs(v).max()) for v in values)
    return Bound(
        most=most,
        best=_total(values, chosen),
        price=price,
        rest_weight=_after(least),
        rest_value=_after(reduced),
        slack=1e-12 * (weight_size * (1 + price) + value_size),
    )


def _total(terms: Sequence[Floats], chosen: Sequence[int]) -> float:
    """Return the sum of the chosen terms, in the order of the layers."""
    total = 0.0
    for term, index in zip(terms, chosen, strict=True):
        total += float(term[index])
    return total


def _after(terms: Sequence[float]) -> list[float]:
    """Return, for each layer, the sum over the layers that follow it."""
    return [math.fsum(terms[layer + 1 :]) for layer in range(len(terms))]


def _hull(weight: Floats, value: Floats) -> list[int]:
    """Return the choices on the lower convex hull, from the lightest to that of least value."""
    hull: list[int] = []
    for i in np.lexsort((value, weight)).tolist():
        if hull and value[i] >= value[hull[-1]]:
            continue
        while len(hull) > 1 and _is_above(weight, value, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _is_above(weight: Floats, value: Floats, a: int, b: int, c: int) -> bool:
    """Whether choice b lies on or above the line from a to c."""
    down = (value[a] - value[b]) * (weight[c] - weight[a])
    return bool(down <= (value[a] - value[c]) * (weight[b] - weight[a]))


def trace(steps: Sequence[Step], row: int) -> tuple[int, ...]:
    """Return the choices of a complete selection, by place."""
    chosen = []
    for step in reversed(steps):
        chosen.append(int(step.place[row]))
        row = int(step.parent[row])
    return tuple(reversed(chosen))
