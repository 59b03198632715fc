"""Joining a search that another process began on a shared database.

The process that asks for a search stores its problem beside the trials: sensitivities, latency
model and goal. Others take trials and run them on clips of their own copy. They measure nothing
else, and export nothing. If they run on another machine, its pace does not matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import optuna
import pandas as pd

from spark3r.latency import LatencyModel
from spark3r.layout import TokenLayout
from spark3r.schedule import LengthRule, Schedule

from ..measure.probe import COLUMNS
from ..progress import Progress, no_progress
from .optimizer import DOCUMENT, OPEN, Score, Trial, Work, storage_errors
from .problem import DeviationLimit, Goal, LatencyLimit, SearchProblem
from .queue import KEY, Entry
from .sampler import KeyedSampler
from .storage import (
    DEFAULT_HEARTBEAT,
    Heartbeat,
    Studies,
    close_database,
    find_studies,
    open_shared,
    quiet,
)
from .storage_errors import Storage, StudyError, shown

WAIT_S = 3600.0
"""Seconds for which a process waits for the search that it joins."""

LOOK_S = 2.0
"""Seconds between two looks for that search."""


def problem_document(problem: SearchProblem) -> dict[str, Any]:
    """Return a problem as plain JSON values."""
    goal = problem.goal
    return {
        "sensitivity": problem.sensitivity[list(COLUMNS)].to_numpy().tolist(),
        "latency": problem.latency.to_dict(),
        "layout": asdict(problem.layout),
        "short": asdict(problem.short),
        "length": asdict(problem.length),
        "sensitive": list(problem.sensitive),
        "goal": {"budget_ms": goal.budget_ms}
        if isinstance(goal, LatencyLimit)
        else {"deviation": goal.most},
    }


def problem_of(document: Mapping[str, Any]) -> SearchProblem:
    """Return the problem that `problem_document` wrote."""
    goal: Goal
    if "deviation" in document["goal"]:
        goal = DeviationLimit(document["goal"]["deviation"])
    else:
        goal = LatencyLimit(document["goal"]["budget_ms"])
    return SearchProblem(
        sensitivity=pd.DataFrame(document["sensitivity"], columns=list(COLUMNS)),
        latency=LatencyModel.from_dict(document["latency"]),
        layout=TokenLayout(**document["layout"]),
        short=TokenLayout(**document["short"]),
        length=LengthRule(**document["length"]),
        sensitive=document["sensitive"],
        goal=goal,
    )


@dataclass(frozen=True)
class Joined:
    """What a process that joined a search did.

    Attributes:
        ran: Number of trials that it ran.
        trials: Number of trials of the search that have finished.
    """

    ran: int
    trials: int


def join(
    storage: Storage,
    prefix: str,
    seed: int,
    objective: Callable[[Schedule], Score],
    *,
    timeout_s: float | None = None,
    wait_s: float = WAIT_S,
    progress: Progress = no_progress,
    say: Callable[[str], object] = lambda line: None,
    read: Callable[[Mapping[str, Any]], SearchProblem] = problem_of,
    heartbeat: Heartbeat = DEFAULT_HEARTBEAT,
    clock: Callable[[], float] = time.monotonic,
) -> Joined:
    """Run trials of a search until all have finished, or until it is closed.

    Args:
        storage: URL of a database server.
        prefix: Beginning of the search's name.
        seed: Seed of the search.
        objective: Function that runs a schedule; see `calibrate.search.optimizer.optimize`.
        timeout_s: Seconds after which no further trial is taken; None for no limit.
        wait_s: Seconds to wait for the search to begin, default an hour.
        progress: Callback(trials finished by all processes, their total).
        say: Function that receives messages.
        read: Function that reads the stored problem.
        heartbeat: Heartbeats.
        clock: Function that returns seconds.

    Raises:
        StudyError: If the storage cannot be used, the search does not begin in time, or several
            match.
    """
    database = open_shared(storage, heartbeat)
    try:
        studies = _wait_for_search(storage, database, prefix, seed, wait_s, say, clock)
        problem = read(studies.proposed.user_attrs[DOCUMENT])
        initial, proposed = _stored(studies.initial), _stored(studies.proposed)

        def on_trial(trial: Trial) -> None:
            progress(len(work.done), len(initial) + len(proposed))

        work = Work(studies, problem, objective, on_trial, clock=clock)
        begin = clock()

        def is_over() -> bool:
            if timeout_s is not None and clock() - begin >= timeout_s:
                return True
            return not studies.initial.user_attrs[OPEN]

        with quiet(), storage_errors(storage, work.done):
            work.refresh(report=False)
            work.run(initial, proposed, is_over, is_closed=is_over)
        return Joined(work.ran, len(work.done))
    finally:
        close_database(database)


def _wait_for_search(
    storage: Storage,
    database: optuna.storages.RDBStorage,
    prefix: str,
    seed: int,
    wait_s: float,
    say: Callable[[str], object],
    clock: Callable[[], float],
) -> Studies:
    """Return the search with a name, as soon as all its trials are there."""
    begin, is_told = clock(), False
    while True:
        found = find_studies(storage, database, prefix, KeyedSampler(seed))
        opened = [each for each in found if OPEN in each.initial.user_attrs]
        if len(opened) > 1:
            raise StudyError(
                f"study storage {shown(storage)} holds {len(opened)} searches of this model, "
                "clips, budget and settings, for different lengths: name one by --target-frames"
            )
        if opened:
            return opened[0]
        if clock() - begin > wait_s:
            raise StudyError(
                f"study storage {shown(storage)}: no search of this model, clips, budget and "
                f"settings began within {wait_s:.0f} s: start the same command without --join"
            )
        if not is_told:
            say("waiting for the search, which begins once the first process has timed the model")
            is_told = True
        time.sleep(LOOK_S)


def _stored(study: optuna.Study) -> dict[str, Entry]:
    """Return the trials of a study by key, as they can be added once more."""
    return {
        trial.user_attrs[KEY]: Entry(
            trial.system_attrs.get("fixed_params", {}),
            {name: trial.user_attrs[name] for name in ("name", "schedule")}
            if "schedule" in trial.user_attrs and not trial.params
            else {},
        )
        for trial in study.get_trials(deepcopy=False)
        if KEY in trial.user_attrs
    }
