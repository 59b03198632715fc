"""Selection of the exported schedule, on made-up scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from calibrate.progress import Reporter
from calibrate.report.trade_off import points, run_trade_off
from calibrate.search.optimizer import Found, Score, Trial
from calibrate.search.problem import DeviationLimit, LatencyLimit
from calibrate.verify.held_out import verify
from calibrate.verify.selection import Finalist, best_so_far, choose, most_faithful, run_finalists
from spark3r import Schedule
from spark3r.prediction import PredictionError
from spark3r.timing import Latency

BUDGET = LatencyLimit(100.0)
NOISE = (-0.01, 0.0, 0.01, 0.005)


def trial(name: str, latency_ms: float, score: float, key_value: int = 2) -> Trial:
    return Trial(name, Schedule.uniform(2, 1, key_value), latency_ms, Score(score))


def finalist(kind: str, latency_ms: float, score: float, sign: int = 1) -> Finalist:
    scores = {f"clip {n}": score + sign * noise for n, noise in enumerate(NOISE)}
    return Finalist(kind, trial(kind, latency_ms, score), scores)


def chosen(*candidates: Finalist) -> str:
    return choose(candidates, BUDGET, "error").chosen.kind


def test_the_simpler_one_is_chosen_unless_the_other_is_better_beyond_its_interval() -> None:
    simple = finalist("uniform", 99, 0.10)
    assert chosen(simple, finalist("search", 100, 0.095, sign=-1)) == "uniform"
    assert chosen(simple, finalist("search", 100, 0.02, sign=-1)) == "search"
    assert chosen(simple, finalist("search", 100, 0.2)) == "uniform"


def test_deviation_decides_where_the_source_is_undecided() -> None:
    simple = replace(finalist("uniform", 99, 0.10), deviation={"a": 0.02, "b": 0.03, "c": 0.02})
    rival = replace(
        finalist("search", 100, 0.095, sign=-1), deviation={"a": 0.01, "b": 0.02, "c": 0.012}
    )
    decision = choose((simple, rival), BUDGET, "error")
    assert decision.chosen.kind == "search"
    assert "more faithful beyond its interval" in decision.reasons[0]
    assert chosen(simple, replace(rival, deviation=simple.deviation)) == "uniform"
    worse = replace(finalist("search", 100, 0.2), deviation=rival.deviation)
    assert chosen(simple, worse) == "uniform"  # worse by the source, however faithful


def test_deviations_are_compared_by_their_ratio() -> None:
    # Clip by clip 0.7 times as far from dense; as logarithms they would differ by a percent or less
    # and not be told apart.
    far, near = {"a": 0.002, "b": 0.04, "c": 0.01}, {"a": 0.0014, "b": 0.028, "c": 0.007}
    simple = replace(finalist("uniform", 99, 0.02), validation=far, deviation=far)
    rival = replace(finalist("search", 100, 0.015), validation=near, deviation=near)
    assert choose((simple, rival), BUDGET, "error").chosen.kind == "search"
    decision = choose((simple, rival), BUDGET, "deviation")
    assert decision.chosen.kind == "search"
    assert "validation clips: 0.70" in decision.reasons[0]
    same = replace(rival, validation=far, deviation=far)
    assert choose((simple, same), BUDGET, "deviation").chosen.kind == "uniform"


def test_a_schedule_that_leaves_much_of_the_budget_unused_must_be_better() -> None:
    slack, full = finalist("uniform", 80, 0.10), finalist("search", 99, 0.10, sign=-1)
    decision = choose((slack, full), BUDGET, "error")
    assert decision.chosen.kind == "search"
    assert "leaves 20% of the budget unused" in decision.reasons[0]
    better = finalist("uniform", 80, 0.01)
    assert chosen(better, full) == "uniform"
    assert chosen(slack) == "uniform"  # there is nothing else


def test_within_a_deviation_the_fastest_is_chosen() -> None:
    goal = DeviationLimit(0.2)
    simple, same = finalist("uniform", 100, 0.1), finalist("search", 99, 0.1)
    assert choose((simple, same), goal, "error").chosen.kind == "uniform"
    assert choose((simple, finalist("search", 90, 0.19)), goal, "error").chosen.kind == "search"


def test_without_validation_the_best_of_the_search_is_taken() -> None:
    trials = (trial("uniform 1/2", 90, 0.3), trial("search 4", 99, 0.1, 3))
    decision = best_so_far(Found(trials, BUDGET))
    assert decision.chosen.kind == "search"
    assert decision.chosen.validation_score is None
    with pytest.raises(ValueError, match="there is no finalist"):
        choose((), BUDGET, "error")


def test_the_trade_off_spans_the_front_with_few_points() -> None:
    latencies = [50, 51, 60, 70, 80, 90, 99, 100, 120, 150, 200]
    trials = [trial(f"search {n}", ms, 1 / ms, n + 1) for n, ms in enumerate(latencies)]
    dominated = trial("uniform 1/99", 110, 5.0, 99)
    found = Found((*trials, dominated), BUDGET)
    kept = [trial.latency_ms for trial in points(found, trials[7])]
    assert len(kept) == 4
    assert kept == sorted(kept)
    assert kept[0] == 50
    assert kept[-1] == 200
    assert not {99, 100, 51, 110} & set(kept)


@dataclass(frozen=True)
class Broken:
    """Cannot run schedules of some key-value factors."""

    broken: tuple[int, ...]
    source: str = "error"

    def qualities(self, schedule: Schedule, dense: object) -> tuple:
        if schedule.layers[0].key_value in self.broken:
            raise PredictionError("depth is NaN")
        return ()

    def scores(self, qualities: tuple, dense: object) -> dict[str, float]:
        return {"a": 0.1, "b": 0.2}

    deviations = scores


RUNS = SimpleNamespace(qualities=())


def test_a_trial_that_fails_on_the_validation_clips_is_replaced_by_the_next_best() -> None:
    trials = (
        trial("uniform 1/2", 90, 0.1, 2),
        trial("uniform 1/3", 90, 0.2, 3),
        trial("search 1", 90, 0.1, 4),
    )
    found = Found(trials, BUDGET)
    kept = run_finalists(found, Broken((2,)), RUNS)  # type: ignore[arg-type]
    assert [each.trial.name for each in kept] == ["uniform 1/3", "search 1"]
    assert run_finalists(found, Broken((2, 3, 4)), RUNS) == ()  # type: ignore[arg-type]


def test_a_schedule_for_a_tighter_budget_represents_its_kind_only_if_there_is_no_other() -> None:
    tighter, own = trial("knapsack 0.8", 85, 0.1, 3), trial("knapsack", 98, 0.2, 2)
    uniform = trial("uniform 1/5", 80, 0.1, 5), trial("uniform 1/4", 98, 0.2, 4)
    kept = run_finalists(Found((tighter, own, *uniform), BUDGET), Broken(()), RUNS)  # type: ignore[arg-type]
    assert [each.trial.name for each in kept] == ["uniform 1/5", "knapsack"]
    kept = run_finalists(Found((tighter,), BUDGET), Broken(()), RUNS)  # type: ignore[arg-type]
    assert [each.trial.name for each in kept] == ["knapsack 0.8"]


@dataclass(frozen=True)
class Harder:
    """On the validation clips everything deviates twice as much as on the clips of the search."""

    source: str = "deviation"

    def qualities(self, schedule: Schedule, dense: object) -> tuple:
        return (schedule.layers[0].key_value,)

    def scores(self, qualities: tuple, dense: object) -> dict[str, float]:
        return {"a": 2 * 0.1 * qualities[0], "b": 2 * 0.1 * qualities[0]}

    deviations = scores


def test_a_trial_that_deviates_too_much_in_validation_is_replaced_by_a_more_faithful_one() -> None:
    # The fastest first; of many at the limit only one is tried before one at half of it.
    trials = tuple(
        trial(f"search {n}", 50 + n, 0.1 * factor, factor)
        for n, factor in enumerate((8, 8, 8, 8, 7, 7, 6, 5, 4, 3, 2, 1))
    )
    (kept,) = run_finalists(Found(trials, DeviationLimit(0.85)), Harder(), RUNS)  # type: ignore[arg-type]
    assert kept.trial.schedule.layers[0].key_value == 4
    assert kept.validation_score == pytest.approx(0.8)


def test_a_trial_that_fails_is_no_point_of_the_trade_off() -> None:
    trials = (trial("uniform 1/2", 90, 0.1, 2), trial("a", 50, 0.5, 6), trial("b", 70, 0.4, 7))
    outcome = SimpleNamespace(
        found=Found(trials, BUDGET),
        decision=best_so_far(Found(trials[:1], BUDGET)),
        interrupted=False,
    )
    job = SimpleNamespace(reporter=Reporter(), is_late=False)
    clips = SimpleNamespace(first=lambda count: RUNS)
    found = run_trade_off(job, Broken((6,)), clips, outcome)  # type: ignore[arg-type]
    assert [each.name for each, _ in found.points] == ["b"]


def test_a_rival_that_fails_on_the_held_out_clips_is_left_out() -> None:
    first, second = finalist("uniform", 99, 0.1), finalist("search", 99, 0.1, sign=-1)
    second = replace(second, trial=trial("search 1", 99, 0.1, 4))
    decision = choose((first, second), BUDGET, "error")
    assert decision.chosen is first
    table = SimpleNamespace(dense=None, wall=Latency((1.0,)))
    found = verify(Broken((4,)), decision, RUNS, table, {})  # type: ignore[arg-type]
    assert [each.name for each in found.treatments] == ["dense", "wall", "uniform"]
    with pytest.raises(PredictionError):
        verify(Broken((2,)), decision, RUNS, table, {})  # type: ignore[arg-type]


def test_if_nothing_is_faithful_enough_in_validation_the_most_faithful_is_taken() -> None:
    trials = (trial("uniform 1/2", 50, 0.19), trial("uniform 1/1", 100, 0.0, 1))
    decision = most_faithful(Found(trials, DeviationLimit(0.2)))
    assert decision.chosen.trial.name == "uniform 1/1"
    assert "interrupted" not in decision.reasons[0]
