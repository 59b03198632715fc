"""Storage of a search's trials in Optuna, so that an interrupted search can be continued.

A search has two studies, because a sampler learns only from trials that all have the same
parameters. One study holds the initial schedules, which have no parameters, the other the trials
that the sampler proposes. A trial's schedule, latency and figures are its user attributes, where
another budget, or a dashboard, finds them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from spark3r.errors import Spark3rWarning
from spark3r.reduction.operators import Operators
from spark3r.schedule import LayerRule, LengthRule, Schedule

from .journal import open_journal
from .storage_errors import Storage, StudyError, fail, is_journal, shown

_INITIAL = " starts"  # suffix of the name of the study of initial schedules


Say = Callable[[str], object]
"""Function that receives a message to the user, one line."""


def warn(line: str) -> None:
    """Give a message as a `Spark3rWarning`."""
    warnings.warn(line, Spark3rWarning, stacklevel=2)


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
    storage: Storage,
    name: str,
    sampler: optuna.samplers.BaseSampler,
    resume: bool,
    say: Say = warn,
) -> Studies:
    """Open a search's studies, and mark trials that a killed process left running as failed.

    A journal file whose end was cut off is mended before.

    Args:
        storage: Storage of the trials; None stores nothing beyond the process.
        name: Name of the studies.
        sampler: Sampler of parameters.
        resume: Whether to continue studies of this name. An empty storage is one that stopped
            before its first trial.
        say: Function that is told what was mended, and how many trials were kept.

    Raises:
        StudyError: If the storage cannot be opened or written, if studies of this name exist and
            ``resume`` is not set, or if only others exist and it is.
    """
    with _quiet():
        opened = _opened(storage, name, resume, say)
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
            fail(storage, "cannot be written", error)
    return studies


def check_database(storage: str | Path) -> None:
    """Open a database and close it again. A journal file is left alone.

    Raises:
        StudyError: If the URL names no database that can be opened.
    """
    if is_journal(storage):
        return
    with _quiet():
        try:
            optuna.storages.get_storage(str(storage)).remove_session()
        except Exception as error:  # a database driver may raise anything
            fail(storage, "cannot be opened", error)


def check_storage(storage: Storage, name: str, resume: bool, say: Say = warn) -> None:
    """Raise the errors of `open_studies` before anything is measured, and create nothing.

    A journal file whose end was cut off is mended.

    The arguments are those of `open_studies`.

    Raises:
        StudyError: As `open_studies`.
    """
    if is_journal(storage) and not Path(str(storage)).exists():
        return
    with _quiet():
        _opened(storage, name, resume, say)


def _opened(
    storage: Storage, name: str, resume: bool, say: Say
) -> optuna.storages.BaseStorage | None:
    opened: optuna.storages.BaseStorage | None
    mended = None
    try:
        if not isinstance(storage, str | Path):
            opened = storage
        elif is_journal(storage):
            opened, mended = open_journal(Path(storage))
        else:
            opened = optuna.storages.get_storage(str(storage))
        names = [] if opened is None else optuna.get_all_study_names(storage=opened)
    except Exception as error:  # a database driver may raise anything
        fail(storage, "cannot be opened", error)
    if opened is not None and mended is not None:
        kept = sum(
            len(finished(optuna.load_study(study_name=each, storage=opened)))
            for each in (name + _INITIAL, name)
            if each in names
        )
        say(f"study storage {storage}: {mended}; {kept} finished trials of this search are kept")
    if name in names and not resume:
        raise StudyError(
            f"study storage {shown(storage)} holds a study of this search already: --resume "
            "continues it, another --output (or --storage, if you gave one) begins a new one"
        )
    if resume and names and not {name, name + _INITIAL} & set(names):
        raise StudyError(
            f"study storage {shown(storage)} holds no study of this model, clips, budget and "
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
