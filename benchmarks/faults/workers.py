"""Eight workers on one search in a real PostgreSQL, of which four are killed at random moments.

    python benchmarks/faults/workers.py --output benchmarks/results/faults_workers.json
    python benchmarks/faults/workers.py --share 0.05

Each round begins a small calibration in an empty database, and seven workers join it. Four of the
eight get SIGKILL, each when a number of trials has finished that is drawn from all, so that kills
meet the search on a machine of any speed. If the one
that began the search is among them, it is started again with --resume, as a user would do. In the
end every trial must have run once: none is lost, none has two results, none is left running or
waiting, no result that was there before a kill has gone, and the profile is written. Heartbeats
come every second here, and the grace is two seconds; runs of a schedule take up to .3 s longer, so
that kills meet them.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import psycopg
from optuna.trial import TrialState

sys.path.append(str(Path(__file__).parents[1]))
from results_io import write_result

import calibrate.search.run
from calibrate.search.joining import join
from calibrate.search.optimizer import SearchOptions
from calibrate.search.queue import KEY
from calibrate.search.storage import Heartbeat, close_database, is_finished, open_shared
from faults.jobs import Job, warm_up

sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
import tiny_job
from postgresql import new_database, postgresql

ROUNDS, WORKERS, KILLED = 20, 8, 4

TRIALS = 24
"""Proposed schedules of a search."""

BEATS = Heartbeat(every_s=1, grace_s=2)

PATIENCE_S = 300
"""Seconds after which a worker counts as one that stands still."""

SLOWER_S = 0.3
"""Seconds by which a run of a schedule is made longer at most."""

WORDS = ("--budget", "75%", *tiny_job.JOB, "--trials", str(TRIALS), "--json", "--quiet")


def prepare() -> None:
    """Let a worker send more heartbeats, and take longer for every run of a schedule.

    A worker that takes `PATIENCE_S` says where it stands, and ends.
    """
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(PATIENCE_S)
    searching: Any = calibrate.search.run
    searching.SearchOptions = partial(SearchOptions, heartbeat=BEATS)
    searching.join = partial(join, heartbeat=BEATS)
    judge, chance = searching._score, random.Random(os.getpid())

    def slower(*arguments: Any) -> Any:
        time.sleep(chance.uniform(0, SLOWER_S))
        return judge(*arguments)

    searching._score = slower


@dataclass
class Worker:
    """A process of a round.

    Attributes:
        job: Its command.
        pid: The process.
        status: Its exit status; None while it runs.
    """

    job: Job
    pid: int
    status: int | None = None

    def look(self) -> bool:
        """Return whether it has ended."""
        if self.status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def kill(self) -> bool:
        """Kill it, and return False if it had ended before."""
        if self.look():
            return False
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        return True


def start(folder: Path, url: str, number: int, cache: Path) -> Worker:
    """Start a worker, the first of which begins the search."""
    role = ("--output", "a.json") if number == 0 else ("--join",)
    job = Job("calibrate", (*WORDS, "--storage", url, *role), folder / str(number), cache)
    return Worker(job, job.start(prepare))


def all_trials(url: str) -> dict[str, list[optuna.trial.FrozenTrial]]:
    """Return all trials of a database by study."""
    database = open_shared(url, BEATS)
    try:
        return {
            name: optuna.load_study(study_name=name, storage=database).get_trials()
            for name in optuna.get_all_study_names(database)
        }
    finally:
        close_database(database)


def results(url: str) -> set[tuple[str, int, Any]]:
    """Return the results in a database: study, number and score of every finished trial."""
    return {
        (name, trial.number, trial.user_attrs.get("score"))
        for name, trials in all_trials(url).items()
        for trial in trials
        if is_finished(trial)
    }


def faults_of(url: str) -> list[str]:
    """Return what is wrong with the trials of a search that has ended."""
    wrong = []
    for name, trials in all_trials(url).items():
        for state in (TrialState.RUNNING, TrialState.WAITING):
            left = sum(trial.state == state for trial in trials)
            wrong += [f"{name}: {left} {state.name}"] * bool(left)
        runs = Counter(trial.user_attrs[KEY] for trial in trials if is_finished(trial))
        keys = {trial.user_attrs[KEY] for trial in trials if KEY in trial.user_attrs}
        if not name.endswith(" starts"):
            keys |= set(map(str, range(TRIALS)))
        wrong += [f"{name}: lost {key}" for key in sorted(keys - runs.keys())]
        wrong += [f"{name}: {key} ran {count} times" for key, count in runs.items() if count > 1]
    return wrong


def sessions_of(url: str) -> str:
    """Return what every session of a server does, and which others it waits for."""
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "SELECT pid, state, wait_event_type, wait_event, pg_blocking_pids(pid), "
            "now() - state_change, query FROM pg_stat_activity WHERE datname = current_database()"
        ).fetchall()
    return "; ".join(" ".join(map(str, row)) for row in rows) or "no session"


def run_round(
    folder: Path, url: str, cache: Path, moments: dict[int, int], chance: random.Random
) -> tuple[int, int, list[str]]:
    """Run a round.

    Args:
        folder: Folder of the workers.
        url: An empty database.
        cache: Folder of stored sensitivities.
        moments: Numbers of finished trials at which workers are killed, by the worker's number.
        chance: Source of the seconds after that.

    Returns:
        The number of trials, the number of kills, and what is wrong.
    """
    workers = [start(folder, url, number, cache) for number in range(WORKERS)]
    kills, before, wrong = 0, set[tuple[str, int, Any]](), list[str]()
    for number, moment in sorted(moments.items(), key=lambda each: each[1]):
        while len(done := results(url)) < moment:
            time.sleep(0.1)
        before |= done
        time.sleep(chance.uniform(0, SLOWER_S))
        if not workers[number].kill():
            continue
        kills += 1
        if number == 0:
            job = workers[0].job
            again = replace(job, words=(*job.words, "--resume"))
            workers[0] = Worker(again, again.start(prepare))
    sessions, begin = "", time.monotonic()
    while not all([worker.look() for worker in workers]):
        time.sleep(0.05)
        if not sessions and time.monotonic() - begin > PATIENCE_S / 2:
            sessions = sessions_of(url)
            wrong.append(f"after {PATIENCE_S / 2:.0f} s the server has {sessions}")
    for number, worker in enumerate(workers):
        if worker.status != 0 and (number == 0 or number not in moments):
            said = (folder / f"{number}.err").read_text()[-3000:]
            wrong.append(f"worker {number} ended with {worker.status}: {said}")
    if not (folder / "0" / "a.json").exists():
        wrong.append("there is no profile")
    wrong += [f"gone: {each}" for each in sorted(before - results(url), key=str)]
    return len(results(url)), kills, wrong + faults_of(url)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all rounds and return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        description="Eight workers on one search in PostgreSQL, of which four are killed."
    )
    parser.add_argument("--share", type=float, default=1.0, help=f"share of {ROUNDS} rounds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--output", type=Path, help="JSON file to write; by default it is printed")
    options = parser.parse_args(arguments)
    chance, rounds = random.Random(options.seed), max(1, round(ROUNDS * options.share))
    kills, firsts, wrong = 0, 0, list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name, postgresql() as server:
        warm_up()
        folder, cache = Path(name), Path(name) / "cache"
        base = new_database(server)
        trials, _, faults = run_round(folder / "undisturbed", base, cache, {}, chance)
        if faults:
            raise SystemExit(f"an undisturbed round fails: {faults}")
        for number in range(rounds):
            victims = chance.sample(range(WORKERS), KILLED)
            moments = {each: chance.randrange(trials - WORKERS) for each in victims}
            _, killed, faults = run_round(
                folder / f"round {number}", new_database(server), cache, moments, chance
            )
            kills, firsts = kills + killed, firsts + (0 in victims)
            if faults:
                wrong.append({"round": number, "moments": moments, "faults": faults})
            print(f"{number + 1} of {rounds} rounds, {len(wrong)} wrong", file=sys.stderr)
    document = {
        "seed": options.seed,
        "workers": WORKERS,
        "rounds": rounds,
        "kills": kills,
        "rounds_in_which_the_first_was_killed": firsts,
        "trials": trials,
        "faults": wrong,
    }
    write_result(document, options.output)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
