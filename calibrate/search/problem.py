"""Goals: the best quality within a budget, or the least latency within a deviation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd

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
    Source,
)
from ..measure.latency_model import LatencyModel
from .baselines import paper_schedules, uniform_schedules
from .candidates import choices
from .knapsack import Choice, Selection, solve, solve_cheapest


@dataclass(frozen=True)
class WithinBudget:
    """The least score of all schedules that are fast enough.

    Attributes:
        budget_ms: Latency that a clip may take.
    """

    budget_ms: float

    @property
    def aim_ms(self) -> float:
        """Latency that is aimed at."""
        return AIM * self.budget_ms

    def parameters(self, space: Space) -> tuple[str, ...]:
        """Return the names of the search's parameters."""
        return space.parameters()

    def proposed(self, space: Space, parameters: Mapping[str, float]) -> Schedule | None:
        """Return the schedule that parameters stand for, within the budget; None if none is."""
        aimed = space.schedule(self.aim_ms, parameters)
        return space.schedule(self.budget_ms, parameters) if aimed is None else aimed

    def value(self, latency_ms: float, score: float) -> float:
        """Return what is minimised."""
        return score

    def excess(self, latency_ms: float, score: float | None) -> float:
        """Return how far a schedule is from what is allowed, at most 0 where it is allowed."""
        return latency_ms - self.budget_ms * (1 + 2 * ROUNDING)


@dataclass(frozen=True)
class WithinDeviation:
    """The least latency of all schedules that are faithful enough.

    What single layers do is not quite what they do together, so how much damage is allowed is a
    parameter of the search.

    Attributes:
        most: Largest mean score by deviation.
    """

    most: float

    def parameters(self, space: Space) -> tuple[str, ...]:
        """Return the names of the search's parameters."""
        return (*space.parameters(), "damage")

    def proposed(self, space: Space, parameters: Mapping[str, float]) -> Schedule | None:
        """Return the fastest schedule of as much damage as the parameters allow."""
        most = self.most * math.exp(parameters.get("damage", 0.0))
        return space.cheapest(most**POWER, parameters)

    def value(self, latency_ms: float, score: float) -> float:
        """Return what is minimised."""
        return latency_ms

    def excess(self, latency_ms: float, score: float | None) -> float:
        """Return how far a schedule is from what is allowed; 1 before it has run."""
        return 1.0 if score is None else score - self.most


Goal = WithinBudget | WithinDeviation


@dataclass(frozen=True)
class Problem:
    """What is to be solved.

    Attributes:
        sensitivity: What single layers bear.
        source: What schedules are judged by.
        latency: Predicts latencies.
        layout: Token layout at the target length.
        short: Token layout of the shortest clip, which bounds the factors.
        length: Length rule of every schedule.
        sensitive: Layers that are sensitive by the paper's probe.
        goal: What is to be reached.
        operators: What layers choose from.
    """

    sensitivity: pd.DataFrame
    source: Source
    latency: LatencyModel
    layout: TokenLayout
    short: TokenLayout
    length: LengthRule
    sensitive: Sequence[int]
    goal: Goal
    operators: Sequence[Operators] = OPERATORS

    @cached_property
    def space(self) -> Space:
        """What a search chooses from."""
        return Space(
            choices(self.sensitivity, self.operators, self.latency, self.layout),
            self.operators,
            self.length,
            self.latency.wall_ms(self.layout),
        )

    def predict_ms(self, schedule: Schedule) -> float:
        """Return what a clip of the target length takes."""
        return self.latency.predict_ms(schedule, self.layout)

    def knapsack(self) -> Schedule | None:
        """Return the schedule that the sensitivities alone say is best; None if there is none."""
        return self.goal.proposed(self.space, {})

    def corrected(self, wall_ms: float, schedule: Schedule, measured_ms: float) -> Problem:
        """Return the problem with a latency model that is right about the wall and a schedule.

        Args:
            wall_ms: The wall, measured.
            schedule: A schedule.
            measured_ms: Its latency, measured beside the wall.
        """
        predicted_ms = self.predict_ms(schedule)
        latency = self.latency.corrected(self.layout, wall_ms, predicted_ms, measured_ms)
        return replace(self, latency=latency)

    def starts(self, *, at_the_goal: bool = False) -> dict[str, Schedule]:
        """Return the schedules that a search starts from, by name.

        The knapsack, also for looser and tighter goals, which the trade-off is drawn from, the
        scaled paper schedules, and the uniform ones.

        Args:
            at_the_goal: Whether to leave out what looser and tighter goals say.
        """
        solved = {"knapsack": self.knapsack()}
        for share in () if at_the_goal else KNAPSACK_SHARES:
            solved[f"knapsack {share:g}"] = self._scaled(share).proposed(self.space, {})
        found = {name: schedule for name, schedule in solved.items() if schedule is not None}
        if isinstance(self.goal, WithinDeviation):
            depth = len(self.space.layers)
            found["uniform 1/1"] = Schedule.uniform(depth, length=self.length)  # always faithful
        for most_ms in self._frontiers()[: 1 if at_the_goal else None]:
            fits = self._within(most_ms)
            depth = len(self.space.layers)
            made = paper_schedules(depth, self.sensitive, self.length, self.short, fits)
            made |= uniform_schedules(depth, self.operators, self.length, self.short, fits)
            found |= {name: each for name, each in made.items() if name not in found}
        return found

    def solved_again(self, proposals: Mapping[str, Mapping[str, float]]) -> dict[str, Schedule]:
        """Return what the sampler's best proposals become under this latency model, by name.

        Args:
            proposals: Parameters of trials of the search by the trial's name, the best first.
        """
        found = {}
        for name, parameters in proposals.items():
            schedule = self.goal.proposed(self.space, parameters)
            if schedule is not None:
                found[f"{name} again"] = schedule
        return found

    def _scaled(self, share: float) -> Goal:
        if isinstance(self.goal, WithinBudget):
            wall_ms = self.space.rest_ms
            return WithinBudget(wall_ms + share * (self.goal.budget_ms - wall_ms))
        return replace(self.goal, most=share * self.goal.most)

    def _frontiers(self) -> tuple[float, ...]:
        """Return the latencies whose frontiers of baselines run; see `.baselines`."""
        wall_ms = self.space.rest_ms
        if isinstance(self.goal, WithinBudget):
            return (self.goal.aim_ms,)
        seed = self.knapsack()
        beyond_ms = 0.0 if seed is None else self.predict_ms(seed) - wall_ms
        return tuple(wall_ms + share * beyond_ms for share in (1.0, *KNAPSACK_SHARES))

    def _within(self, most_ms: float) -> Callable[[Schedule], bool]:
        goal = WithinBudget(most_ms)
        return lambda schedule: goal.excess(self.predict_ms(schedule), None) <= 0


def least_latency_ms(
    model: LatencyModel, layout: TokenLayout, short: TokenLayout, depth: int
) -> float:
    """Return the least latency of any schedule that sensitivities are measured for.

    Args:
        model: The latency model.
        layout: Token layout at the target length.
        short: Token layout of the shortest calibration clip, which bounds the factors.
        depth: Global layers.
    """
    rules = [
        clamp(ResolvedRule(query, key_value, each), short)
        for each in OPERATORS
        for query in (1, *QUERY_FACTORS)
        for key_value in (1, *KEY_VALUE_FACTORS)
    ]
    return model.wall_ms(layout) + depth * min(model.layer_ms(rule, layout) for rule in rules)


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
