"""Storage of a search's trials in Optuna, so that an interrupted search can be continued.

A search has two studies, because a sampler learns only from trials that all have the same
parameters. One study holds the initial schedules, which have no parameters, the other the trials
that the sampler proposes. A trial's schedule, latency and figures are its user attributes, where
another budget, or a dashboard, finds them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from spark3r.errors import Spark3rError
from spark3r.reduction.operators import Operators
from spark3r.schedule import LayerRule, LengthRule, Schedule

Storage = str | Path | optuna.storages.BaseStorage | None
"""Path of a journal file, an Optuna URL (a string with ``://``), an open storage, or None."""

_INITIAL = " starts"  # suffix of the name of the study of initial schedules


class StudyError(Spark3rError):
    """A study cannot be opened, continued or written."""


@dataclass(frozen=True)
class Studies:
    """The two studies of one search.

    Attributes:
        initial: Trials of the initial schedules.
        proposed: Trials of the schedules that the sampler proposed.
    """

    initial: optuna.Study
    proposed: optuna.Study


def open_studies(
    storage: Storage, name: str, sampler: optuna.samplers.BaseSampler, resume: bool
) -> Studies:
    """Open a search's studies, and mark trials that a killed process left running as failed.

    Args:
        storage: Storage of the trials; None stores nothing beyond the process.
        name: Name of the studies.
        sampler: Sampler of parameters.
        resume: Whether to continue studies of this name. An empty storage is one that stopped
            before its first trial.

    Raises:
        StudyError: If the storage cannot be opened or written, if studies of this name exist and
            ``resume`` is not set, or if only others exist and it is.
    """
    with _quiet():
        opened = _opened(storage, name, resume)
        try:
            studies = Studies(
                *(
                    optuna.create_study(
                        storage=opened, study_name=each, sampler=sampler, load_if_exists=True
                    )
                    for each in (name + _INITIAL, name)
                )
            )
            for study in (studies.initial, studies.proposed):
                for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                    study.tell(trial.number, state=TrialState.FAIL)
        except Exception as error:
            raise StudyError(
                f"study storage {_shown(storage)}: cannot be written ({error})"
            ) from error
    return studies


@contextmanager
def lock_journal(storage: Storage) -> Iterator[None]:
    """Lock a journal file against other processes for as long as this one searches.

    Only journal files are locked; a database handles concurrency itself.

    Raises:
        StudyError: If another process holds the lock, or the folder cannot be written.
    """
    if not _is_journal(storage):
        yield
        return
    path = Path(f"{storage}.busy")
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise StudyError(
            f"study storage {storage}: another process is searching there right now; wait for it, "
            "or choose another --output (or --storage, if you gave one)"
        ) from error
    except OSError as error:
        raise StudyError(f"study storage {storage}: cannot be written ({error})") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def check_storage(storage: Storage, name: str, resume: bool) -> None:
    """Raise the errors of `open_studies` before anything is measured, and create nothing.

    The arguments are those of `open_studies`.

    Raises:
        StudyError: As `open_studies`.
    """
    if _is_journal(storage) and not Path(str(storage)).exists():
        return
    with _quiet():
        _opened(storage, name, resume)


def _opened(storage: Storage, name: str, resume: bool) -> optuna.storages.BaseStorage | None:
    try:
        opened = _storage(storage)
        names = [] if opened is None else optuna.get_all_study_names(storage=opened)
    except Exception as error:  # a database driver may raise anything
        raise StudyError(f"study storage {_shown(storage)}: cannot be opened ({error})") from error
    if name in names and not resume:
        raise StudyError(
            f"study storage {_shown(storage)} holds a study of this search already: --resume "
            "continues it, another --output (or --storage, if you gave one) begins a new one"
        )
    if resume and names and name not in names:
        raise StudyError(
            f"study storage {_shown(storage)} holds no study of this model, clips, budget and "
            "settings to continue; leave out --resume to begin one"
        )
    return opened


def finished(study: optuna.Study) -> tuple[FrozenTrial, ...]:
    """Return the finished trials, with those failed ones that store a reason."""
    states = (TrialState.COMPLETE, TrialState.FAIL)
    return tuple(
        trial
        for trial in study.get_trials(deepcopy=False, states=states)
        if "schedule" in trial.user_attrs
        and (trial.state == TrialState.COMPLETE or "failure" in trial.user_attrs)
    )


def encode(schedule: Schedule) -> dict[str, Any]:
    """Return a schedule as plain JSON values."""
    return {
        "layers": [
            {
                "query": rule.query,
                "key_value": rule.key_value,
                "operators": None if rule.operators is None else rule.operators.to_dict(),
            }
            for rule in schedule.layers
        ],
        "operators": schedule.operators.to_dict(),
        "length": asdict(schedule.length),
    }


def decode(document: Mapping[str, Any]) -> Schedule:
    """Return the schedule that `encode` wrote."""
    return Schedule(
        tuple(
            LayerRule(
                rule["query"],
                rule["key_value"],
                None if rule["operators"] is None else Operators.from_dict(rule["operators"]),
            )
            for rule in document["layers"]
        ),
        Operators.from_dict(document["operators"]),
        LengthRule(**document["length"]),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Optuna's own log lines."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _shown(storage: Storage) -> str:
    """Return a storage's name without its password."""
    return re.sub(r"(://[^/@]*:)[^/@]*@", r"\1***@", str(storage))


def _is_journal(storage: Storage) -> bool:
    return isinstance(storage, Path) or (isinstance(storage, str) and "://" not in storage)


def _storage(storage: Storage) -> optuna.storages.BaseStorage | None:
    if storage is None or isinstance(storage, optuna.storages.BaseStorage):
        return storage
    if not _is_journal(storage):
        return optuna.storages.get_storage(str(storage))
    path = Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # Optuna marks the journal as experimental. We rely on its file format, and test it.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        backend = JournalFileBackend(str(path))
        return optuna.storages.JournalStorage(backend)
