"""Baselines of a search: scaled paper schedules and uniform ones.

*Scaled paper schedule*: the paper's operators and sensitive layers, tiers (r, 3r), one query factor
from 1 to 4 in all layers. *Uniform*: any of our operators, one pair of integer factors in all
layers. The best of all that meet the budget is the one to beat.

Not all of them have to run. Let two such schedules have the same operators and layers. If both
factors of the first are smaller, it keeps more of what dense attention sees and deviates less. So a
pair only needs to run if neither of its factors can be made smaller within the budget. These pairs
are the *frontier*. Error is not as well behaved: reduction can improve it on long clips, and a pair
behind the frontier may then be better. A tighter budget finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from spark3r.layout import TokenLayout
from spark3r.reduction.operators import Operators
from spark3r.reduction.rule import ResolvedRule
from spark3r.schedule import PAPER_TIER, LayerRule, LengthRule, Schedule

PAPER_QUERY_FACTORS = (1, 2, 3, 4)

Pair = tuple[int, int]
"""Query and key-value factor."""


def frontier(
    queries: Iterable[int], largest: int, fits: Callable[[int, int], bool]
) -> tuple[Pair, ...]:
    """Return the pairs that fit and of which neither factor can be smaller.

    Args:
        queries: Query factors, the smallest first.
        largest: Largest key-value factor.
        fits: Function that returns True if a query and a key-value factor meet the budget. If they
            do, so do larger key-value factors.
    """
    found: list[Pair] = []
    for query in queries:
        last = found[-1][1] - 1 if found else largest
        pair = next(((query, r) for r in range(1, last + 1) if fits(query, r)), None)
        if pair is not None:
            found.append(pair)
    return tuple(found)


def paper_schedules(
    depth: int,
    sensitive: Iterable[int],
    length: LengthRule,
    short: TokenLayout,
    fits: Callable[[Schedule], bool],
) -> dict[str, Schedule]:
    """Return the frontier of the scaled paper schedules that meet the budget, by name.

    The layout of the shortest clip (``short``) bounds the factors.
    """
    chosen = set(sensitive)
    largest = largest_factors(Operators(), short)[1]

    def scaled(query: int, key_value: int) -> Schedule:
        tiers = (key_value, min(PAPER_TIER * key_value, largest))
        rules = tuple(LayerRule(query, tiers[layer not in chosen]) for layer in range(depth))
        return Schedule(rules, Operators(), length)

    pairs = frontier(PAPER_QUERY_FACTORS, largest, lambda *pair: fits(scaled(*pair)))
    return {f"paper {query}/{key_value}": scaled(query, key_value) for query, key_value in pairs}


def uniform_schedules(
    depth: int,
    operators: Sequence[Operators],
    length: LengthRule,
    short: TokenLayout,
    fits: Callable[[Schedule], bool],
) -> dict[str, Schedule]:
    """Return the frontiers of the uniform schedules with each of the operators, by name.

    The layout of the shortest clip (``short``) bounds the factors.
    """
    found: dict[str, Schedule] = {}
    rules = set()
    for each in operators:

        def uniform(query: int, key_value: int, each: Operators = each) -> Schedule:
            return Schedule.uniform(depth, query, key_value, operators=each, length=length)

        query, key_value = largest_factors(each, short)
        pairs = frontier(range(1, query + 1), key_value, lambda q, r: fits(uniform(q, r)))
        for q, r in pairs:
            rule = ResolvedRule(q, r, each)
            if rule not in rules:
                rules.add(rule)
                found[f"uniform {q}/{r} {each.describe()}"] = uniform(q, r)
    return found


def largest_factors(operators: Operators, layout: TokenLayout) -> Pair:
    """Return the largest query and key-value factor that a layout allows under operators."""
    return layout.patches, operators.key_value.largest_factor(layout)
