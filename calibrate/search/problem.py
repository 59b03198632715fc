"""The problem of a search: its choices, its goal, and the schedules to start from.

The goal is a limit on latency, within which the best quality is sought, or a limit on deviation,
within which the least latency is sought.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd

from spark3r.latency import LatencyModel
from spark3r.layout import TokenLayout
from spark3r.reduction.operators import Operators
from spark3r.reduction.rule import ResolvedRule, clamp
from spark3r.schedule import LengthRule, Schedule

from ..defaults import (
    AIM,
    KEY_VALUE_FACTORS,
    KNAPSACK_SHARES,
    OPERATORS,
    POWER,
    QUERY_FACTORS,
)
from .baselines import paper_schedules, uniform_schedules
from .candidates import choices
from .knapsack import Assignment, Choice, solve, solve_cheapest

ROUNDING = 1e-9
"""Share of the budget by which a sum over layers may exceed it through rounding."""


@dataclass(frozen=True)
class Space:
    """The schedules that a search chooses from.

    Attributes:
        layers: Choices of each layer, with the degradation that the sensitivities predict.
        operators: Operators in order. A parameter weighs each but the first.
        length: Length rule of every schedule.
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
        """Return the schedule of least weighted degradation within a budget, None if there is none.

        Weights of parameters that are left out are 1, their logarithms 0.
        """
        layers = self._weighted(log_weights)
        return self._schedule(layers, solve(layers, budget_ms * (1 + ROUNDING) - self.rest_ms))

    def cheapest(self, max_degradation: float, log_weights: Mapping[str, float]) -> Schedule | None:
        """Return the fastest schedule within a weighted degradation, None if there is none."""
        layers = self._weighted(log_weights)
        return self._schedule(layers, solve_cheapest(layers, max_degradation))

    def _weighted(self, log_weights: Mapping[str, float]) -> list[list[Choice]]:
        """Return the choices with weighted degradations."""

        def weight(parameter: str) -> float:
            return math.exp(log_weights.get(parameter, 0.0))

        by_operators: dict[Operators | None, float] = {None: 1.0}
        for index, each in enumerate(self.operators):
            by_operators[each] = weight(f"operators {index}")
        by_query = weight("query")
        layers = []
        for index, layer in enumerate(self.layers):
            by_layer = weight(f"layer {index}")
            layers.append(
                [
                    replace(
                        choice,
                        degradation=choice.degradation
                        * by_layer
                        * by_operators[choice.rule.operators]
                        * (by_query if choice.rule.query > 1 else 1.0),
                    )
                    for choice in layer
                ]
            )
        return layers

    def _schedule(
        self, layers: Sequence[Sequence[Choice]], found: Assignment | None
    ) -> Schedule | None:
        if found is None:
            return None
        return replace(found.schedule(layers, self.operators[0]), length=self.length)


@dataclass(frozen=True)
class LatencyLimit:
    """The goal of the least score among all schedules that are fast enough.

    Attributes:
        budget_ms: Largest latency per clip.
    """

    budget_ms: float

    @property
    def aim_ms(self) -> float:
        """Latency that is aimed at, a little below the budget."""
        return AIM * self.budget_ms

    def parameters(self, space: Space) -> tuple[str, ...]:
        """Return the names of the search's parameters."""
        return space.parameters()

    def proposed(self, space: Space, parameters: Mapping[str, float]) -> Schedule | None:
        """Return the schedule for values of the parameters, None if none is fast enough."""
        aimed = space.schedule(self.aim_ms, parameters)
        return space.schedule(self.budget_ms, parameters) if aimed is None else aimed

    def scaled(self, share: float, wall_ms: float) -> LatencyLimit:
        """Return the limit at a share of the way from the wall to this one."""
        return LatencyLimit(wall_ms + share * (self.budget_ms - wall_ms))

    def value(self, latency_ms: float, score: float) -> float:
        """Return the number to minimise."""
        return score

    def excess(self, latency_ms: float, score: float | None) -> float:
        """Return the distance from what is allowed, at most 0 for an allowed schedule."""
        return latency_ms - self.budget_ms * (1 + 2 * ROUNDING)


@dataclass(frozen=True)
class DeviationLimit:
    """The goal of the least latency among all schedules that are faithful enough.

    The degradations of single layers do not quite add up to that of all together, so the allowed
    sum of degradations is a parameter of the search.

    Attributes:
        most: Largest mean score by deviation.
    """

    most: float

    def parameters(self, space: Space) -> tuple[str, ...]:
        """Return the names of the search's parameters."""
        return (*space.parameters(), "degradation")

    def proposed(self, space: Space, parameters: Mapping[str, float]) -> Schedule | None:
        """Return the fastest schedule within the degradation that the parameters allow."""
        most = self.most * math.exp(parameters.get("degradation", 0.0))
        return space.cheapest(most**POWER, parameters)

    def scaled(self, share: float, wall_ms: float) -> DeviationLimit:
        """Return the limit at a share of this one."""
        return DeviationLimit(share * self.most)

    def value(self, latency_ms: float, score: float) -> float:
        """Return the number to minimise."""
        return latency_ms

    def excess(self, latency_ms: float, score: float | None) -> float:
        """Return the distance from what is allowed; 1 before a schedule has run."""
        return 1.0 if score is None else score - self.most


Goal = LatencyLimit | DeviationLimit


@dataclass(frozen=True)
class SearchProblem:
    """The problem of finding a schedule.

    Attributes:
        sensitivity: Sensitivities around the dense model.
        latency: Latency model.
        layout: Token layout at the target length.
        short: Token layout of the shortest clip, which bounds the factors.
        length: Length rule of every schedule.
        sensitive: Sensitive layers by the paper's probe.
        goal: The goal.
        operators: Operators that a layer chooses from.
    """

    sensitivity: pd.DataFrame
    latency: LatencyModel
    layout: TokenLayout
    short: TokenLayout
    length: LengthRule
    sensitive: Sequence[int]
    goal: Goal
    operators: Sequence[Operators] = OPERATORS

    @cached_property
    def space(self) -> Space:
        """The schedules to choose from."""
        return Space(
            choices(self.sensitivity, self.operators, self.latency, self.layout),
            self.operators,
            self.length,
            self.latency.wall_ms(self.layout),
        )

    def predict_ms(self, schedule: Schedule) -> float:
        """Return the predicted latency of a clip of the target length."""
        return self.latency.predict_ms(schedule, self.layout)

    def knapsack(self) -> Schedule | None:
        """Return the best schedule by the sensitivities alone, None if there is none."""
        return self.goal.proposed(self.space, {})

    def corrected(self, wall_ms: float, schedule: Schedule, measured_ms: float) -> SearchProblem:
        """Return the problem with a latency model that is right about the wall and a schedule."""
        predicted_ms = self.predict_ms(schedule)
        latency = self.latency.corrected(self.layout, wall_ms, predicted_ms, measured_ms)
        return replace(self, latency=latency)

    def initial_schedules(self) -> dict[str, Schedule]:
        """Return the schedules that a search starts from, by name.

        They are the knapsack's answer, the scaled paper schedules and the uniform ones, and for the
        trade-off the knapsack's answers to looser and tighter goals.
        """
        depth, wall_ms = len(self.space.layers), self.space.rest_ms
        solved = {"knapsack": self.knapsack()}
        for share in KNAPSACK_SHARES:
            goal = self.goal.scaled(share, wall_ms)
            solved[f"knapsack {share:g}"] = goal.proposed(self.space, {})
        found = {name: schedule for name, schedule in solved.items() if schedule is not None}
        if isinstance(self.goal, DeviationLimit):
            found["uniform 1/1"] = Schedule.uniform(depth, length=self.length)  # always faithful
        for most_ms in self._frontiers():
            fits = self._within(most_ms)
            made = paper_schedules(depth, self.sensitive, self.length, self.short, fits)
            made |= uniform_schedules(depth, self.operators, self.length, self.short, fits)
            found |= {name: each for name, each in made.items() if name not in found}
        return found

    def repeat_proposals(self, proposals: Mapping[str, Mapping[str, float]]) -> dict[str, Schedule]:
        """Return the schedules that earlier trials' parameters give under this latency model."""
        found = {}
        for name, parameters in proposals.items():
            schedule = self.goal.proposed(self.space, parameters)
            if schedule is not None:
                found[f"{name} again"] = schedule
        return found

    def _frontiers(self) -> tuple[float, ...]:
        """Return the latencies at which the frontiers of baselines run; see `.baselines`."""
        if isinstance(self.goal, LatencyLimit):
            return (self.goal.aim_ms,)
        wall_ms, answer = self.space.rest_ms, self.knapsack()
        beyond_ms = 0.0 if answer is None else self.predict_ms(answer) - wall_ms
        return tuple(wall_ms + share * beyond_ms for share in (1.0, *KNAPSACK_SHARES))

    def _within(self, most_ms: float) -> Callable[[Schedule], bool]:
        limit = LatencyLimit(most_ms)
        return lambda schedule: limit.excess(self.predict_ms(schedule), None) <= 0


def least_latency_ms(
    model: LatencyModel, layout: TokenLayout, short: TokenLayout, depth: int
) -> float:
    """Return the least latency at a layout of any schedule whose factors are measured.

    The layout of the shortest clip (``short``) bounds the factors.
    """
    rules = [
        clamp(ResolvedRule(query, key_value, each), short)
        for each in OPERATORS
        for query in (1, *QUERY_FACTORS)
        for key_value in (1, *KEY_VALUE_FACTORS)
    ]
    return model.wall_ms(layout) + depth * min(model.layer_ms(rule, layout) for rule in rules)
