"""The queue of a search's trials, from which one process or several take the next.

Every trial has a key: a hash of its schedule, or the number of a proposal. A process adds trials
for keys that lack one, takes one trial after the other, and runs it. Where processes share the
database, it sends heartbeats meanwhile. A trial of a killed process has no result, so its key gets
another trial. If two processes add a trial for one key, the first of the two counts.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from .storage import Studies, finished, is_finished

KEY = "key"
"""Name of the user attribute that holds a trial's key."""

_UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)


class NoResult(Exception):
    """A trial ends as failed; the reason, if there is one, is stored with it."""


@dataclass(frozen=True)
class Entry:
    """A trial to add.

    Attributes:
        parameters: Parameters that the sampler does not choose.
        attributes: User attributes.
    """

    parameters: Mapping[str, float] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


Run = Callable[[optuna.Trial], float]
"""Function that runs a trial and returns its value, or raises `NoResult`."""

After = Callable[[FrozenTrial], object]
"""Callback for a trial that ended here."""


def add_missing(study: optuna.Study, wanted: Mapping[str, Entry]) -> None:
    """Add a trial for every wanted key that lacks one."""
    for key in _missing(study, wanted):
        _add(study, key, wanted[key])


def run_all(
    studies: Studies,
    study: optuna.Study,
    wanted: Mapping[str, Entry],
    run: Run,
    after: After,
    is_over: Callable[[], bool],
) -> None:
    """Run trials until every wanted key has one that is finished, or that another process runs.

    A process that is alone adds one trial at a time, so that a search that is continued keeps their
    order.

    Args:
        studies: The studies of the search.
        study: The one of them that the trials are from.
        wanted: Trials to run, by key.
        run: Function that runs a trial.
        after: Callback for every trial that ended here.
        is_over: Function that returns True if no further trial shall run.
    """
    alone = studies.database is None
    while not is_over():
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not any(trial.user_attrs.get(KEY) in wanted for trial in waiting):
            missing = _missing(study, wanted)
            if not missing:
                return
            for key in missing[:1] if alone else missing:
                _add(study, key, wanted[key])
        _run_next(studies, study, run, after)


def unfinished(study: optuna.Study, wanted: Mapping[str, Entry]) -> list[str]:
    """Return the wanted keys that have no finished trial."""
    done = {trial.user_attrs.get(KEY) for trial in finished(study)} if wanted else set()
    return [key for key in wanted if key not in done]


def all_ended(studies: Studies, seen: dict[int, float], clock: Callable[[], float]) -> bool:
    """Return whether no trial runs any more; trials of killed processes are failed.

    Optuna fails a trial whose heartbeats stopped, and never one that had none, because its process
    was killed before the first. Such a trial gets a heartbeat on behalf of that process, after
    which it is like the others. Heartbeats of a process that lives are not disturbed by that.

    Args:
        studies: The studies.
        seen: When this process first saw each running trial, by its id; updated here.
        clock: Function that returns seconds.
    """
    database = studies.database
    running = False
    for study in (studies.initial, studies.proposed):
        fail_stale(study)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            running = True
            first = seen.setdefault(trial._trial_id, clock())
            if database is not None and clock() - first > (database.grace_period or 0):
                database.record_heartbeat(trial._trial_id)
                seen[trial._trial_id] = float("inf")
    return not running


def fail_stale(study: optuna.Study) -> None:
    """Mark the trials whose heartbeats stopped as failed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


def _add(study: optuna.Study, key: str, entry: Entry) -> None:
    study.enqueue_trial(dict(entry.parameters), user_attrs={KEY: key, **entry.attributes})


def _missing(study: optuna.Study, wanted: Mapping[str, Entry]) -> list[str]:
    """Return the wanted keys that no trial has which is finished, running or waiting."""
    if not wanted:
        return []
    held = {
        trial.user_attrs.get(KEY)
        for trial in study.get_trials(deepcopy=False)
        if trial.state in _UNFINISHED or is_finished(trial)
    }
    return [key for key in wanted if key not in held]


def _run_next(studies: Studies, study: optuna.Study, run: Run, after: After) -> None:
    """Run the next trial that waits."""
    fail_stale(study)
    with warnings.catch_warnings():
        # Heartbeats are ours: those of `optuna.Study.optimize` print a traceback where the database
        # is away for a moment, and it hides errors of the storage behind its own.
        warnings.filterwarnings("ignore", "Heartbeat of storage")
        trial = study.ask()
    try:
        with _beating(studies.database, trial._trial_id):
            try:
                value = None if _is_surplus(study, trial) else run(trial)
            except NoResult:
                value = None
            except BaseException:
                study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
                raise
            state = TrialState.FAIL if value is None else TrialState.COMPLETE
            ended = study.tell(trial, value, state, skip_if_finished=True)
    except optuna.exceptions.UpdateFinishedTrialError:
        # This process stood still for so long that another one failed the trial.
        return
    after(ended)


@contextmanager
def _beating(database: optuna.storages.RDBStorage | None, trial_id: int) -> Iterator[None]:
    """Send heartbeats of a trial in the block, where processes share the database."""
    if database is None:
        yield
        return
    ended = threading.Event()
    every_s = database.heartbeat_interval

    def beat() -> None:
        try:
            while not ended.wait(every_s):
                # If the database stays away, the result of the trial cannot be stored either.
                with suppress(Exception):
                    database.record_heartbeat(trial_id)
        finally:
            database.remove_session()

    database.record_heartbeat(trial_id)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _is_surplus(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Return whether a trial has no key, or an earlier one of its key counts."""
    key = trial.user_attrs.get(KEY)
    return key is None or any(
        is_finished(other) or (other.number < trial.number and other.state in _UNFINISHED)
        for other in study.get_trials(deepcopy=False)
        if other.number != trial.number and other.user_attrs.get(KEY) == key
    )
