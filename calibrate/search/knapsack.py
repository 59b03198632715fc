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

import numpy as np

from spark3r.schedule import LayerRule, Operators, Schedule

from .partial import MAX_PARTIAL, Floats, FrontTooLargeError, Integers, least_value

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
