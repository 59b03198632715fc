"""What a search is compared with: the scaled paper schedule and the best uniform one.

*Scaled paper schedule*: the paper's operators and sensitive layers, tiers (r, 3r), query factors 1
to 4 everywhere; for each query factor the smallest r that meets the budget. *Uniform*: one pair of
factors in all layers; for each choice of operators and each query factor the smallest key-value
factor that meets the budget. A smaller factor is never worse for attention than a larger one, so
that the others need not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from spark3r.schedule import PAPER_TIER, LayerRule, LengthRule, Operators, Schedule

PAPER_QUERY_FACTORS = (1, 2, 3, 4)
UNIFORM_QUERY_FACTORS = (1, 2, 3, 4, 6, 8)

Predict = Callable[[Schedule], float]


def paper_schedules(
    depth: int,
    sensitive: Iterable[int],
    length: LengthRule,
    largest: int,
    predict_ms: Predict,
    budget_ms: float,
) -> dict[str, Schedule]:
    """Return the scaled paper schedules that just meet a budget, by name.

    Args:
        depth: Global layers of the model.
        sensitive: Sensitive layers of the paper's probe.
        length: Length rule.
        largest: Largest key-value factor.
        predict_ms: The latency model.
        budget_ms: Latency that a clip may take.
    """
    chosen = set(sensitive)

    def scaled(query: int, key_value: int) -> Schedule:
        tiers = (key_value, min(PAPER_TIER * key_value, largest))
        rules = tuple(LayerRule(query, tiers[layer not in chosen]) for layer in range(depth))
        return Schedule(rules, Operators(), length)

    found = {}
    for query in PAPER_QUERY_FACTORS:
        for key_value in range(1, largest + 1):
            schedule = scaled(query, key_value)
            if predict_ms(schedule) <= budget_ms:
                found[f"paper {query}/{key_value}"] = schedule
                break
    return found


def uniform_schedules(
    depth: int,
    operators: Sequence[Operators],
    length: LengthRule,
    largest: int,
    predict_ms: Predict,
    budget_ms: float,
) -> dict[str, Schedule]:
    """Return the uniform schedules that just meet a budget, by name.

    Args:
        depth: Global layers of the model.
        operators: Operators to choose from.
        length: Length rule.
        largest: Largest key-value factor.
        predict_ms: The latency model.
        budget_ms: Latency that a clip may take.
    """
    found = {}
    for number, each in enumerate(operators):
        for query in UNIFORM_QUERY_FACTORS:
            for key_value in range(1, largest + 1):
                schedule = Schedule.uniform(depth, query, key_value, operators=each, length=length)
                if predict_ms(schedule) <= budget_ms:
                    found[f"uniform {query}/{key_value} {_short(each, number)}"] = schedule
                    break
    return found


def _short(operators: Operators, number: int) -> str:
    return f"{operators.key_value} {number}" if number else operators.key_value
