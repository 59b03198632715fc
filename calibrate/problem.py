"""What is to be solved: sensitivities and latencies, the goal, and the schedules to start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd

from spark3r.layout import TokenLayout
from spark3r.reduction import clamp
from spark3r.schedule import LayerRule, LengthRule, Operators, Schedule

from .baselines import paper_schedules, uniform_schedules
from .damage import choices
from .goal import Goal, WithinBudget, WithinDeviation
from .latency import LatencyModel
from .objective import Source
from .search import Trial
from .settings import KEY_VALUE_FACTORS, KNAPSACK_SHARES, OPERATORS, QUERY_FACTORS
from .space import Space


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

    def solved_again(self, trials: Sequence[Trial]) -> dict[str, Schedule]:
        """Return what the sampler's best proposals become under this latency model, by name.

        Args:
            trials: Trials of the search, whose parameters are known, the best first.
        """
        found = {}
        for trial in trials:
            schedule = self.goal.proposed(self.space, trial.parameters)
            if schedule is not None:
                found[f"{trial.name} again"] = schedule
        return found

    def _scaled(self, share: float) -> Goal:
        if isinstance(self.goal, WithinBudget):
            wall_ms = self.space.rest_ms
            return WithinBudget(wall_ms + share * (self.goal.budget_ms - wall_ms))
        return replace(self.goal, most=share * self.goal.most)

    def _frontiers(self) -> tuple[float, ...]:
        """Return the latencies whose frontiers of baselines run; see `calibrate.baselines`."""
        wall_ms = self.space.rest_ms
        if isinstance(self.goal, WithinBudget):
            return (self.goal.aim_ms,)
        seed = self.knapsack()
        beyond_ms = 0.0 if seed is None else self.predict_ms(seed) - wall_ms
        return tuple(wall_ms + share * beyond_ms for share in (1.0, *KNAPSACK_SHARES))

    def _within(self, most_ms: float) -> Callable[[Schedule], bool]:
        goal = WithinBudget(most_ms)
        return lambda schedule: goal.excess(self.predict_ms(schedule), None) <= 0


def least_ms(model: LatencyModel, layout: TokenLayout, short: TokenLayout, depth: int) -> float:
    """Return the least latency of any schedule that sensitivities are measured for.

    Args:
        model: The latency model.
        layout: Token layout at the target length.
        short: Token layout of the shortest calibration clip, which bounds the factors.
        depth: Global layers.
    """
    rules = [
        clamp(LayerRule(query, key_value, each), short)
        for each in OPERATORS
        for query in (1, *QUERY_FACTORS)
        for key_value in (1, *KEY_VALUE_FACTORS)
    ]
    return model.wall_ms(layout) + depth * min(model.layer_ms(rule, layout) for rule in rules)
