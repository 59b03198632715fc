from __future__ import annotations

import itertools
import math
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import optuna
import pytest
import toys

from calibrate.search.optimizer import Found, Score, SearchOptions, Trial, optimize
from calibrate.search.problem import DeviationLimit, Goal, LatencyLimit
from calibrate.search.storage import decode, encode, lock_storage
from calibrate.search.storage_errors import StudyError
from spark3r import LayerRule, LengthRule, Operators, Schedule, Spark3rError
from spark3r.reduction.operators import QueryMerging

BUDGET_MS = 18.0
BUDGET = LatencyLimit(BUDGET_MS)
AIM_MS = BUDGET.aim_ms


def run(
    objective=toys.additive,
    trials: int = 6,
    *,
    goal: Goal = BUDGET,
    predict_ms=toys.predict_ms,
    on_trial=lambda trial: None,
    clock=time.monotonic,
    **options,
) -> Found:
    return optimize(
        toys.Problem(goal, predict_ms=predict_ms),
        toys.starts(),
        objective,
        SearchOptions(trials, **options),
        on_trial=on_trial,
        clock=clock,
    )


def test_additive_toy_is_solved_by_the_knapsack() -> None:
    found = run(trials=1)
    best = found.ranked()[0]
    assert best.name == "search 1"
    assert best.score is not None
    assert best.score.value == pytest.approx(toys.best_value(toys.additive, AIM_MS))
    assert best.score.figures == {"twice": 2 * best.score.value}
    assert best.score.mean == 3 * best.score.value


def test_the_aim_is_below_the_budget_unless_nothing_is_that_fast() -> None:
    space = toys.space()
    schedule = LatencyLimit(BUDGET_MS).proposed(space, {})
    assert schedule is not None
    assert toys.predict_ms(schedule) <= AIM_MS
    least_ms = min(toys.predict_ms(Schedule.uniform(4, *pair)) for pair in toys.FACTORS)
    tight = LatencyLimit(least_ms / 0.99)
    kept = tight.proposed(space, {})
    assert kept is not None
    assert tight.aim_ms < toys.predict_ms(kept) <= tight.budget_ms
    assert LatencyLimit(0.99 * least_ms).proposed(space, {}) is None


def test_interactions_are_found() -> None:
    wanted = toys.best_value(toys.interacting, AIM_MS)
    found = run(toys.interacting, trials=80, seed=1)
    values = {trial.name: trial.score.value for trial in found.trials if trial.score}
    assert values["search 1"] > wanted + 0.5
    best = found.ranked()[0].score
    assert best is not None
    assert best.value == pytest.approx(wanted)


def test_every_proposal_is_within_the_budget() -> None:
    found = run(toys.interacting, trials=12)
    proposed = [trial for trial in found.trials if trial.name not in toys.starts()]
    assert len(proposed) == 12
    assert all(trial.latency_ms <= AIM_MS * (1 + 1e-8) for trial in proposed)
    assert all(trial.latency_ms == toys.predict_ms(trial.schedule) for trial in found.trials)
    assert "too slow" not in {trial.name for trial in found.ranked()}
    assert "too slow" in {trial.name for trial in found.front()}


@pytest.mark.slow
def test_a_deviation_limit_finds_the_fastest_schedule_that_is_faithful_enough() -> None:
    most = 0.5
    rules = [LayerRule(*pair) for pair in toys.FACTORS]
    allowed = [
        toys.predict_ms(schedule)
        for layers in itertools.product(rules, repeat=4)
        if toys.interacting(schedule := Schedule(layers)).value <= most
    ]
    found = run(toys.interacting, trials=80, goal=DeviationLimit(most))
    best = found.ranked()[0]
    assert best.score is not None
    assert best.score.value <= most
    assert best.latency_ms == pytest.approx(min(allowed))
    assert "uniform" not in {trial.name for trial in found.ranked()}  # fast, but it deviates more
    by_knapsack = next(trial for trial in found.trials if trial.name == "search 1")
    assert by_knapsack.latency_ms >= best.latency_ms


def test_latencies_of_earlier_trials_are_predicted_anew(tmp_path: Path) -> None:
    storage = tmp_path / "study.journal"
    first = run(trials=3, storage=storage, name="a")
    slower = run(
        trials=3,
        storage=storage,
        name="a",
        resume=True,
        predict_ms=lambda schedule: 2 * toys.predict_ms(schedule),
    )
    assert [trial.latency_ms for trial in slower.trials] == [
        2 * trial.latency_ms for trial in first.trials
    ]
    assert not slower.ranked()


def test_only_one_process_at_a_time_uses_a_journal(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    with (
        lock_storage(journal),
        pytest.raises(StudyError, match="another process is searching"),
        lock_storage(journal),
    ):
        raise AssertionError("two are at it")
    with lock_storage(journal), lock_storage(tmp_path / "other.journal"), lock_storage(None):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with (
        pytest.raises(StudyError, match="cannot be written"),
        lock_storage(tmp_path / "file" / "a.journal"),
    ):
        raise AssertionError("there is no such folder")


def test_front_is_sorted_and_undominated() -> None:
    front = run(toys.interacting, trials=10).front()
    pairs = [(trial.latency_ms, trial.score.value) for trial in front if trial.score]
    assert pairs == sorted(pairs)
    assert [value for _, value in pairs] == sorted((value for _, value in pairs), reverse=True)


def test_same_seed_same_schedule() -> None:
    first, second = (run(toys.interacting, seed=3) for _ in range(2))
    assert first == second
    assert run(toys.interacting, seed=4) != first


def test_each_schedule_runs_once() -> None:
    seen: list[Schedule] = []

    def objective(schedule: Schedule) -> Score:
        seen.append(schedule)
        return Score(0.0)

    run(objective, trials=8)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    ("failing", "why"),
    [
        (lambda schedule: Score(math.nan), "its score is nan"),
        (lambda schedule: _raise(Spark3rError("depth is NaN")), "Spark3rError: depth is NaN"),
        (lambda schedule: _raise(MemoryError("no room")), "MemoryError: no room"),
        (
            lambda schedule: _raise(RuntimeError("DefaultCPUAllocator: can't allocate memory")),
            "RuntimeError: DefaultCPUAllocator: can't allocate memory",
        ),
    ],
)
def test_failed_trials_do_not_end_the_search(failing, why: str) -> None:
    calls = iter(range(100))

    def objective(schedule: Schedule) -> Score:
        return failing(schedule) if next(calls) in (0, 2) else toys.additive(schedule)

    found = run(objective, trials=4)
    failed = [trial for trial in found.trials if trial.score is None]
    assert failed
    assert all(trial.failure == why for trial in failed)
    assert len(found.trials) == 6
    assert found.ranked()[0].score is not None


def _raise(error: Exception) -> Score:
    raise error


def test_defects_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run(lambda schedule: Score(1 / 0))


def test_ctrl_c_keeps_finished_trials() -> None:
    def objective(schedule: Schedule) -> Score:
        if schedule not in toys.starts().values():
            raise KeyboardInterrupt
        return toys.additive(schedule)

    found = run(objective)
    assert found.interrupted
    assert [trial.name for trial in found.trials] == ["uniform", "too slow"]
    assert found.ranked()[0].name == "uniform"


def test_time_limit() -> None:
    ticks = iter([0.0, 1.0, 2.0, 100.0])
    found = run(trials=50, timeout_s=50, clock=lambda: next(ticks))
    assert len(found.trials) == 2 + 2


def test_resumed_search_keeps_every_trial_and_runs_none_again(tmp_path: Path) -> None:
    storage = tmp_path / "study.journal"
    whole = run(toys.interacting, trials=3, storage=storage, name="a")
    reported: list[Trial] = []
    seen: list[Schedule] = []

    def objective(schedule: Schedule) -> Score:
        seen.append(schedule)
        return toys.interacting(schedule)

    more = run(
        objective, trials=6, storage=storage, name="a", resume=True, on_trial=reported.append
    )
    assert all(trial in more.trials for trial in whole.trials)
    assert len(reported) == 3
    assert not {trial.schedule for trial in whole.trials} & set(seen)


def test_other_studies_are_not_continued(tmp_path: Path) -> None:
    storage = tmp_path / "study.journal"
    run(trials=1, storage=storage, name="a", resume=True)  # stopped before its first trial
    with pytest.raises(StudyError, match="holds no study of this model"):
        run(trials=1, storage=storage, name="c", resume=True)
    with pytest.raises(StudyError, match="--resume continues it"):
        run(trials=1, storage=storage, name="a")
    run(trials=1, storage=storage, name="b")


def test_storage_by_url(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    first = run(trials=1, storage=url, name="a")
    assert run(trials=1, storage=url, name="a", resume=True) == first


@pytest.mark.parametrize("storage", ["nonsense://host/base", "a_file/x.journal"])
def test_unusable_storage(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("no folder")
    with pytest.raises(StudyError, match="cannot be"):
        run(trials=1, storage=storage, name="a")


@pytest.mark.slow
def test_killed_process_loses_no_finished_trial(tmp_path: Path) -> None:
    storage = tmp_path / "study.journal"
    program = f"""
        import sys, time
        sys.path.insert(0, {str(Path(toys.__file__).parent)!r})
        import toys
        from calibrate.search.problem import LatencyLimit
        from calibrate.search.optimizer import SearchOptions, optimize
        calls = iter(range(100))
        def objective(schedule):
            if next(calls) == 4:
                print("in the middle of a trial", flush=True)
                time.sleep(60)
            return toys.interacting(schedule)
        optimize(toys.Problem(LatencyLimit({BUDGET_MS})), toys.starts(), objective,
                 SearchOptions(9, storage={str(storage)!r}, name="a"))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in the middle of a trial\n"
    process.kill()
    process.wait()
    process.stdout.close()

    seen: list[Schedule] = []

    def objective(schedule: Schedule) -> Score:
        seen.append(schedule)
        return toys.interacting(schedule)

    found = run(objective, trials=9, storage=storage, name="a", resume=True)
    assert len(found.trials) == 2 + 9
    distinct = {trial.schedule for trial in found.trials}
    assert len(distinct - set(seen)) == 4  # what had run before the kill did not run again
    kept = optuna.load_study(
        study_name="a",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(storage))
        ),
    )
    states = [trial.state for trial in kept.get_trials()]
    assert states.count(optuna.trial.TrialState.FAIL) == 1
    assert optuna.trial.TrialState.RUNNING not in states
    assert all(
        trial.constraints["excess"] <= 0
        for trial in kept.get_trials()
        if trial.state == optuna.trial.TrialState.COMPLETE
    )


def test_schedules_survive_storage() -> None:
    schedule = Schedule(
        (LayerRule(2, 8), LayerRule(1, 4, toys.THIN)),
        Operators(QueryMerging(group=7)),
        LengthRule("constant_kept_frames", 24, 2, 900),
    )
    assert decode(encode(schedule)) == schedule
