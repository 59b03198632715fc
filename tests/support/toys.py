"""Toy searches: layers of known cost and degradation, no model and no clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from calibrate.search.knapsack import Choice
from calibrate.search.optimizer import Score
from calibrate.search.problem import Goal, Space
from spark3r.reduction.operators import Operators, TokenStride
from spark3r.schedule import LayerRule, LengthRule, Schedule

STRIDE = Operators()
THIN = Operators(key_value=TokenStride(keep_anchor=True, mass_correction=1.0))
FACTORS = ((1, 1), (1, 4), (1, 16), (2, 4), (4, 16))
REST_MS = 10.0


def cost_ms(rule: LayerRule) -> float:
    return 10.0 / (rule.query * rule.key_value)


def degradation(layer: int, rule: LayerRule) -> float:
    return (1 + layer) * (0.3 * (rule.query - 1) + 0.01 * (rule.key_value - 1))


def space(layers: int = 4) -> Space:
    choices = [
        [
            Choice(rule, cost_ms(rule), degradation(layer, rule) * (1.5 if each == THIN else 1.0))
            for each in (STRIDE, THIN)
            for query, key_value in FACTORS
            for rule in [LayerRule(query, key_value, each)]
        ]
        for layer in range(layers)
    ]
    return Space(choices, (STRIDE, THIN), LengthRule(), REST_MS)


def predict_ms(schedule: Schedule) -> float:
    return REST_MS + sum(cost_ms(rule) for rule in schedule.layers)


def additive(schedule: Schedule) -> Score:
    value = sum(degradation(layer, rule) for layer, rule in enumerate(schedule.resolve(10)))
    return Score(value, {"twice": 2 * value}, judged=3 * value)


def interacting(schedule: Schedule) -> Score:
    """Return the score of `additive`, with more for neighbours that both reduce strongly."""
    harsh = [rule.key_value > 4 for rule in schedule.layers]
    pairs = sum(first and second for first, second in itertools.pairwise(harsh))
    return Score(additive(schedule).value + 2.0 * pairs)


def best_value(score: Callable[[Schedule], Score], budget_ms: float, layers: int = 4) -> float:
    rules = [LayerRule(*pair) for pair in FACTORS]
    schedules = (Schedule(each) for each in itertools.product(rules, repeat=layers))
    return min(score(each).value for each in schedules if predict_ms(each) <= budget_ms)


@dataclass(frozen=True)
class Problem:
    """The parts of a problem that a search uses."""

    goal: Goal
    space: Space = field(default_factory=space)
    predict_ms: Callable[[Schedule], float] = predict_ms


def starts(layers: int = 4) -> Mapping[str, Schedule]:
    return {
        "uniform": Schedule.uniform(layers, 1, 16),
        "too slow": Schedule.dense(layers),
    }
