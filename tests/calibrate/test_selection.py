"""Which schedule is exported, on made-up scores."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calibrate.goal import WithinBudget, WithinDeviation
from calibrate.search import Found, Score, Trial
from calibrate.selection import Finalist, best_so_far, choose, trade_off
from spark3r import Schedule

BUDGET = WithinBudget(100.0)
NOISE = (-0.01, 0.0, 0.01, 0.005)


def trial(name: str, latency_ms: float, score: float, key_value: int = 2) -> Trial:
    return Trial(name, Schedule.uniform(2, 1, key_value), latency_ms, Score(score))


def finalist(kind: str, latency_ms: float, score: float, sign: int = 1) -> Finalist:
    scores = {f"clip {n}": score + sign * noise for n, noise in enumerate(NOISE)}
    return Finalist(kind, trial(kind, latency_ms, score), scores)


def chosen(*candidates: Finalist) -> str:
    return choose(candidates, BUDGET).chosen.kind


def test_the_simpler_one_stays_unless_the_other_is_better_beyond_doubt() -> None:
    simple = finalist("uniform", 99, 0.10)
    assert chosen(simple, finalist("search", 100, 0.095, sign=-1)) == "uniform"
    assert chosen(simple, finalist("search", 100, 0.02, sign=-1)) == "search"
    assert chosen(simple, finalist("search", 100, 0.2)) == "uniform"


def test_where_the_source_does_not_tell_deviation_may() -> None:
    simple = replace(finalist("uniform", 99, 0.10), deviation={"a": 0.02, "b": 0.03, "c": 0.02})
    rival = replace(
        finalist("search", 100, 0.095, sign=-1), deviation={"a": 0.01, "b": 0.02, "c": 0.012}
    )
    decision = choose((simple, rival), BUDGET)
    assert decision.chosen.kind == "search"
    assert "more faithful beyond its interval" in decision.reasons[0]
    assert chosen(simple, replace(rival, deviation=simple.deviation)) == "uniform"
    worse = replace(finalist("search", 100, 0.2), deviation=rival.deviation)
    assert chosen(simple, worse) == "uniform"  # worse by the source, however faithful


def test_a_budget_is_there_to_be_used() -> None:
    slack, full = finalist("uniform", 80, 0.10), finalist("search", 99, 0.10, sign=-1)
    decision = choose((slack, full), BUDGET)
    assert decision.chosen.kind == "search"
    assert "leaves 20% of the budget unused" in decision.reasons[0]
    better = finalist("uniform", 80, 0.01)
    assert chosen(better, full) == "uniform"
    assert chosen(slack) == "uniform"  # there is nothing else


def test_within_a_deviation_the_fastest_is_chosen() -> None:
    goal = WithinDeviation(0.2)
    simple, same = finalist("uniform", 100, 0.1), finalist("search", 99, 0.1)
    assert choose((simple, same), goal).chosen.kind == "uniform"
    assert choose((simple, finalist("search", 90, 0.19)), goal).chosen.kind == "search"


def test_without_a_selection_the_best_of_the_search_is_taken() -> None:
    trials = (trial("uniform 1/2", 90, 0.3), trial("search 4", 99, 0.1, 3))
    decision = best_so_far(Found(trials, BUDGET))
    assert decision.chosen.kind == "search"
    assert decision.chosen.selection_score is None
    with pytest.raises(ValueError, match="no schedule that is allowed"):
        choose((), BUDGET)


class Judged:
    """Says nothing of quality."""

    def qualities(self, schedule: Schedule, dense: object) -> tuple:
        return ()


def test_the_trade_off_spans_the_front_with_few_points() -> None:
    latencies = [50, 51, 60, 70, 80, 90, 99, 100, 120, 150, 200]
    trials = [trial(f"search {n}", ms, 1 / ms, n + 1) for n, ms in enumerate(latencies)]
    dominated = trial("uniform 1/99", 110, 5.0, 99)
    found = Found((*trials, dominated), BUDGET)
    points = trade_off(found, trials[7], Judged(), None)  # type: ignore[arg-type]
    kept = [point.trial.latency_ms for point in points]
    assert len(kept) == 4
    assert kept == sorted(kept)
    assert kept[0] == 50
    assert kept[-1] == 200
    assert not {99, 100, 51, 110} & set(kept)
