from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from calibrate.search.baselines import frontier, largest_factors, paper_schedules, uniform_schedules
from spark3r import LengthRule, Operators, Schedule
from spark3r.layout import TokenLayout
from spark3r.reduction.operators import QueryMerging, TokenStride

SHORT = TokenLayout(12, 4, 4, special=5, anchor_frame=0)
STRIDE = Operators()
THIN = Operators(key_value=TokenStride(keep_anchor=True, mass_correction=1.0))
DEPTH = 4


def cost(schedule: Schedule) -> float:
    return sum(1 / (rule.query * rule.key_value) for rule in schedule.layers)


@given(
    st.dictionaries(st.integers(1, 6), st.integers(1, 20), min_size=6, max_size=6),
    st.integers(1, 12),
)
def test_every_pair_that_fits_is_at_or_behind_the_frontier(
    least: dict[int, int], largest: int
) -> None:
    """For each query factor any key-value factor from ``least`` on fits, in no order of queries."""
    queries = sorted(least)
    pairs = frontier(queries, largest, lambda query, key_value: key_value >= least[query])
    fitting = {(q, r) for q in queries for r in range(least[q], largest + 1)}
    assert set(pairs) <= fitting
    for query, key_value in fitting:
        assert any(q <= query and r <= key_value for q, r in pairs)
    for first in pairs:
        for second in pairs:
            assert first == second or not (first[0] <= second[0] and first[1] <= second[1])


def test_uniform_schedules_cover_every_choice_of_operators_and_every_integer() -> None:
    made = uniform_schedules(
        DEPTH, (STRIDE, THIN), LengthRule(), SHORT, lambda s: cost(s) <= DEPTH / 7
    )
    by_operators: dict[Operators, set[tuple[int, int]]] = {}
    for schedule in made.values():
        (rule,) = set(schedule.layers)
        by_operators.setdefault(schedule.operators, set()).add((rule.query, rule.key_value))
    assert by_operators[STRIDE] == {(1, 7), (2, 4), (3, 3), (4, 2), (7, 1)}
    # With keys and values left alone it is the same schedule, which stands once.
    assert by_operators[THIN] == by_operators[STRIDE] - {(7, 1)}
    assert len(made) == 9  # no name is taken twice
    moved = replace(THIN, query=QueryMerging(unmerge="linear"))
    either = uniform_schedules(
        DEPTH, (STRIDE, THIN, moved), LengthRule(), SHORT, lambda s: cost(s) <= DEPTH / 7
    )
    merging = {name for name, each in either.items() if each.operators == moved}
    assert len(merging) == 4  # those that merge queries, (7, 1) among them
    assert made.items() <= either.items()


def test_factors_stay_within_what_short_clips_allow() -> None:
    assert largest_factors(STRIDE, SHORT) == (16, 12)
    assert largest_factors(THIN, SHORT) == (16, 16)
    made = uniform_schedules(
        DEPTH, (STRIDE,), LengthRule(), SHORT, lambda s: cost(s) <= DEPTH / 100
    )
    assert {(s.layers[0].query, s.layers[0].key_value) for s in made.values()} == {
        (9, 12),
        (10, 10),
        (12, 9),
        (13, 8),
        (15, 7),
    }


def test_scaled_paper_schedules_have_two_tiers() -> None:
    made = paper_schedules(DEPTH, [1], LengthRule(), SHORT, lambda s: cost(s) <= 1.0)
    assert set(made) == {"paper 1/2", "paper 2/1"}
    slow, fast = made["paper 1/2"], made["paper 2/1"]
    assert [(rule.query, rule.key_value) for rule in slow.layers] == [
        (1, 6),
        (1, 2),
        (1, 6),
        (1, 6),
    ]
    assert [(rule.query, rule.key_value) for rule in fast.layers] == [
        (2, 3),
        (2, 1),
        (2, 3),
        (2, 3),
    ]
    assert slow.operators == Operators()
    tight = paper_schedules(DEPTH, [1], LengthRule(), SHORT, lambda s: s.layers[1].key_value >= 8)
    assert tight["paper 1/8"].layers[0].key_value == 12  # three times 8 is more than there is
