"""Studies: every finished trial of a search kept in an Optuna storage, to go on from after a stop.

A search keeps two studies. One holds the schedules it starts from, which have no parameters, the
other the trials that the sampler proposes: a sampler can only learn from trials that all have the
same parameters. A trial's schedule, latency and figures stand in its user attributes, so that
another budget, or a dashboard, finds them there.
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
"""A journal file's path, an Optuna URL (a string with ``://``), a storage at hand, or none."""

_STARTS = " starts"  # ends the name of the study of starting schedules


class StudyError(Spark3rError):
    """A study that cannot be opened, continued or written."""


@dataclass(frozen=True)
class Studies:
    """The two studies of one search.

    Attributes:
        starts: Trials of the schedules the search starts from.
        proposed: Trials of the schedules the sampler proposed.
    """

    starts: optuna.Study
    proposed: optuna.Study


def open_studies(
    storage: Storage, name: str, sampler: optuna.samplers.BaseSampler, resume: bool
) -> Studies:
    """Open a search's studies, and count trials that a killed process left running as failed.

    Args:
        storage: Where trials are kept; None keeps nothing after the process.
        name: Name of the studies.
        sampler: Proposes parameters.
        resume: Whether to go on where studies of this name stopped; where the storage holds
            nothing at all, it stopped before the first trial.

    Raises:
        StudyError: If the storage cannot be opened or written, if studies of this name exist and
            ``resume`` is not set, or if only others exist and it is.
    """
    with _quiet():
        kept = _opened(storage, name, resume)
        try:
            studies = Studies(
                *(
                    optuna.create_study(
                        storage=kept, study_name=each, sampler=sampler, load_if_exists=True
                    )
                    for each in (name + _STARTS, name)
                )
            )
            for study in (studies.starts, studies.proposed):
                for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                    study.tell(trial.number, state=TrialState.FAIL)
        except Exception as error:
            raise StudyError(
                f"study storage {_shown(storage)}: cannot be written ({error})"
            ) from error
    return studies


@contextmanager
def alone(storage: Storage) -> Iterator[None]:
    """Keep other processes off a journal for as long as this one searches.

    What is no journal is not kept, and is for the data base to share.

    Raises:
        StudyError: If another process is at it, or its folder cannot be written.
    """
    if not _is_journal(storage):
        yield
        return
    mark = Path(f"{storage}.busy")
    lock = FileLock(mark)
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise StudyError(
            f"study storage {storage}: another process is searching there right now; wait for it, "
            "or choose another --output (or --storage, where that is given)"
        ) from error
    except OSError as error:
        raise StudyError(f"study storage {storage}: cannot be written ({error})") from error
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)
        lock.release()


def check_storage(storage: Storage, name: str, resume: bool) -> None:
    """Refuse what `open_studies` would, before anything is measured for it; make nothing.

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
        kept = _storage(storage)
        names = [] if kept is None else optuna.get_all_study_names(storage=kept)
    except Exception as error:  # whatever the driver of a data base raises
        raise StudyError(f"study storage {_shown(storage)}: cannot be opened ({error})") from error
    if name in names and not resume:
        raise StudyError(
            f"study storage {_shown(storage)} holds a study of this search already: --resume goes "
            "on with it, another --output (or --storage, where that is given) begins anew"
        )
    if resume and names and name not in names:
        raise StudyError(
            f"study storage {_shown(storage)} holds no study of this model, clips, budget and "
            "settings to go on with; leave out --resume to begin one"
        )
    return kept


def finished(study: optuna.Study) -> tuple[FrozenTrial, ...]:
    """Return the trials that were finished, failed ones among them where they say why."""
    states = (TrialState.COMPLETE, TrialState.FAIL)
    return tuple(
        trial
        for trial in study.get_trials(deepcopy=False, states=states)
        if "schedule" in trial.user_attrs
        and (trial.state == TrialState.COMPLETE or "failure" in trial.user_attrs)
    )


def encode(schedule: Schedule) -> dict[str, Any]:
    """Return a schedule as JSON takes it."""
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
    """Keep Optuna's own log lines off the terminal."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _shown(storage: Storage) -> str:
    """Return a storage as it may be printed: without its password."""
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
        # The journal is marked experimental; its file format is what we rely on, and test.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        backend = JournalFileBackend(str(path))
        return optuna.storages.JournalStorage(backend)
