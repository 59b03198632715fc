"""What a search chooses from: weights on the damages, which the knapsack turns into schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from spark3r.schedule import LengthRule, Operators, Schedule

from .knapsack import Choice, Selection, solve, solve_cheapest

ROUNDING = 1e-9
"""Share of the budget by which a sum of layers may exceed it through rounding."""


@dataclass(frozen=True)
class Space:
    """What a search chooses from.

    Attributes:
        layers: Per layer its choices, damage being what the sensitivities say.
        operators: Operators in order; a parameter weighs each but the first.
        length: Length rule of every schedule proposed.
        rest_ms: Latency of everything outside the choices.
    """

    layers: Sequence[Sequence[Choice]]
    operators: Sequence[Operators]
    length: LengthRule
    rest_ms: float

    def parameters(self) -> tuple[str, ...]:
        """Return the names of the search's parameters."""
        layers = [f"layer {index}" for index in range(len(self.layers))]
        others = [f"operators {index}" for index in range(1, len(self.operators))]
        return (*layers, "query", *others)

    @property
    def least_ms(self) -> float:
        """Latency of the fastest schedule."""
        return self.rest_ms + sum(min(choice.cost_ms for choice in layer) for layer in self.layers)

    def schedule(self, budget_ms: float, log_weights: Mapping[str, float]) -> Schedule | None:
        """Return the schedule of least weighted damage within a budget, None if none is.

        Args:
            budget_ms: Latency of a whole clip.
            log_weights: Logarithms of the weights by parameter; a missing one is 0.
        """
        layers = self._weighted(log_weights)
        return self._made(layers, solve(layers, budget_ms * (1 + ROUNDING) - self.rest_ms))

    def cheapest(self, max_damage: float, log_weights: Mapping[str, float]) -> Schedule | None:
        """Return the fastest schedule of at most so much weighted damage, None if there is none.

        Args:
            max_damage: Sum of the damages of all layers.
            log_weights: As of `schedule`.
        """
        layers = self._weighted(log_weights)
        return self._made(layers, solve_cheapest(layers, max_damage))

    def _weighted(self, log_weights: Mapping[str, float]) -> list[list[Choice]]:
        weigh = log_weights.get
        by_operators = {
            each: math.exp(weigh(f"operators {index}", 0.0))
            for index, each in enumerate(self.operators)
        }
        by_query = math.exp(weigh("query", 0.0))
        return [
            [
                replace(
                    choice,
                    damage=choice.damage
                    * math.exp(weigh(f"layer {index}", 0.0))
                    * (
                        1.0
                        if choice.rule.operators is None
                        else by_operators[choice.rule.operators]
                    )
                    * (by_query if choice.rule.query > 1 else 1.0),
                )
                for choice in layer
            ]
            for index, layer in enumerate(self.layers)
        ]

    def _made(self, layers: Sequence[Sequence[Choice]], found: Selection | None) -> Schedule | None:
        if found is None:
            return None
        return replace(found.schedule(layers, self.operators[0]), length=self.length)
