"""Storage of a search's trials in Optuna, so that an interrupted search can be continued.

A search has two studies, because a sampler learns only from trials that all have the same
parameters. One study holds the initial schedules, which have no parameters, the other the trials
that the sampler proposes. A trial's schedule, latency and figures are its user attributes, where
another budget, or a dashboard, finds them.

A journal file, or a file of SQLite, belongs to one process at a time. A database server is shared
by any number of processes. There a process that runs a trial says so every few seconds (its
heartbeat), and a trial without heartbeats counts as that of a killed process.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

from spark3r.errors import Spark3rWarning
from spark3r.reduction.operators import Operators
from spark3r.schedule import LayerRule, LengthRule, Schedule

from .journal import open_journal
from .storage_errors import Storage, StudyError, fail, is_journal, shown

_INITIAL = " starts"  # suffix of the name of the study of initial schedules

_POSTGRESQL = re.compile(r"postgres(ql)?://")

_CONNECT_S = 15
"""Seconds after which a database server that does not answer counts as unreachable."""

_OPENINGS = 5
"""Attempts to open a database. Of several processes that create its tables at once, one succeeds
first, and the others fail once."""


Say = Callable[[str], object]
"""Function that receives a message to the user, one line."""


def warn(line: str) -> None:
    """Give a message as a `Spark3rWarning`."""
    warnings.warn(line, Spark3rWarning, stacklevel=2)


@dataclass(frozen=True)
class Heartbeat:
    """How often a process says that it runs a trial, where processes share a database.

    Attributes:
        every_s: Seconds between two heartbeats, default 10.
        grace_s: Seconds without one after which a trial counts as that of a killed process,
            default 60.
    """

    every_s: int = 10
    grace_s: int = 60


DEFAULT_HEARTBEAT = Heartbeat()


@dataclass(frozen=True)
class Studies:
    """The two studies of one search.

    Attributes:
        initial: Trials of the initial schedules.
        proposed: Trials of the schedules that the sampler proposed.
        database: Database that other processes may use as well; None if this process is alone.
    """

    initial: optuna.Study
    proposed: optuna.Study
    database: optuna.storages.RDBStorage | None = None


def is_shared(storage: Storage) -> bool:
    """Return whether several processes may use a storage at once: a database server."""
    return isinstance(storage, str) and not is_journal(storage) and _sqlite_file(storage) is None


def _sqlite_file(url: str) -> str | None:
    """Return the file of an SQLite URL, an empty one for a database in memory.

    It is None if the URL is of another database.
    """
    if not url.startswith("sqlite"):
        return None
    try:
        file = sqlalchemy.make_url(url).database or ""
    except sqlalchemy.exc.ArgumentError:
        return ""
    return "" if file == ":memory:" or file.startswith("file:") else file


@contextmanager
def lock_storage(storage: Storage) -> Iterator[None]:
    """Lock a file of trials against other processes for as long as this one searches.

    A database server handles concurrency itself.

    Raises:
        StudyError: If another process holds the lock, or the folder cannot be written.
    """
    file: str | Path | None = None
    if is_journal(storage):
        file = str(storage)
    elif isinstance(storage, str):
        file = _sqlite_file(storage)
    if not file:
        yield
        return
    path = Path(f"{file}.busy")
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise StudyError(
            f"study storage {shown(storage)}: another process is searching there right now, and a "
            "file belongs to one process; wait for it, or choose another --output (or --storage, "
            "if you gave one). Several processes can share a search in a database server: "
            "--storage postgresql://..."
        ) from error
    except OSError as error:
        fail(storage, "cannot be written", error)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def open_studies(
    storage: Storage,
    name: str,
    sampler: optuna.samplers.BaseSampler,
    resume: bool,
    say: Say = warn,
    heartbeat: Heartbeat = DEFAULT_HEARTBEAT,
) -> Studies:
    """Open a search's studies.

    A journal file whose end was cut off is mended before. Where this process is alone, trials that
    a killed process left running are marked as failed.

    Args:
        storage: Storage of the trials; None stores nothing beyond the process.
        name: Name of the studies.
        sampler: Sampler of parameters.
        resume: Whether to continue studies of this name. An empty storage is one that stopped
            before its first trial.
        say: Function that is told what was mended, and how many trials were kept.
        heartbeat: Heartbeats on a database server.

    Raises:
        StudyError: If the storage cannot be opened or written, if studies of this name exist and
            ``resume`` is not set, or if only others exist and it is.
    """
    with quiet():
        opened = _opened(storage, name, resume, say, heartbeat)
        try:
            initial, proposed = (
                optuna.create_study(
                    storage=opened, study_name=each, sampler=sampler, load_if_exists=resume
                )
                for each in (name + _INITIAL, name)
            )
            database = opened if isinstance(opened, optuna.storages.RDBStorage) else None
            if not is_shared(storage):
                database = None
            for study in () if database else (initial, proposed):
                for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                    study.tell(trial.number, state=TrialState.FAIL)
        except optuna.exceptions.DuplicatedStudyError:
            raise _exists_already(storage) from None
        except Exception as error:
            fail(storage, "cannot be written", error)
    return Studies(initial, proposed, database)


def require_shared(storage: Storage) -> None:
    """Raise unless several processes may use a storage at once.

    Raises:
        StudyError: If it belongs to one process.
    """
    if not is_shared(storage):
        raise StudyError(
            f"study storage {'(none)' if storage is None else shown(storage)} belongs to one "
            "process, so no other can join its search: give a database server, such as "
            "--storage postgresql://user@host/base, to all of them"
        )


def open_shared(storage: Storage, heartbeat: Heartbeat) -> optuna.storages.RDBStorage:
    """Open a database server, which several processes may use at once.

    Raises:
        StudyError: If the storage belongs to one process, or cannot be opened.
    """
    require_shared(storage)
    with quiet():
        try:
            return _open_database(str(storage), heartbeat)
        except Exception as error:  # a database driver may raise anything
            fail(storage, "cannot be opened", error)


def find_studies(
    storage: Storage,
    database: optuna.storages.RDBStorage,
    prefix: str,
    sampler: optuna.samplers.BaseSampler,
) -> list[Studies]:
    """Return the searches in a database whose names begin with a prefix.

    Raises:
        StudyError: If the database cannot be read.
    """

    def load(name: str) -> optuna.Study:
        return optuna.load_study(study_name=name, storage=database, sampler=sampler)

    with quiet():
        try:
            names = optuna.get_all_study_names(storage=database)
            found = [name for name in names if name.startswith(prefix) and name + _INITIAL in names]
            return [Studies(load(name + _INITIAL), load(name), database) for name in found]
        except Exception as error:  # a database driver may raise anything
            fail(storage, "cannot be read", error)


def check_database(storage: str | Path) -> None:
    """Open a database and close it again. A journal file is left alone.

    Raises:
        StudyError: If the URL names no database that can be opened.
    """
    if is_journal(storage):
        return
    with quiet():
        try:
            close_database(_open_database(str(storage), DEFAULT_HEARTBEAT))
        except Exception as error:  # a database driver may raise anything
            fail(storage, "cannot be opened", error)


def close_database(database: optuna.storages.BaseStorage | None) -> None:
    """Close the connections to a database."""
    if isinstance(database, optuna.storages.RDBStorage):
        database.remove_session()
        database.engine.dispose()


def check_storage(storage: Storage, name: str, resume: bool, say: Say = warn) -> None:
    """Raise the errors of `open_studies` before anything is measured, and create nothing.

    A journal file whose end was cut off is mended.

    The arguments are those of `open_studies`.

    Raises:
        StudyError: As `open_studies`.
    """
    if is_journal(storage) and not Path(str(storage)).exists():
        return
    with quiet():
        opened = _opened(storage, name, resume, say, DEFAULT_HEARTBEAT)
    if is_shared(storage):
        close_database(opened)


def _open_database(url: str, heartbeat: Heartbeat) -> optuna.storages.RDBStorage:
    """Open the database of a URL, and create its tables if they are missing.

    ``postgresql://`` is read as psycopg 3, whatever SQLAlchemy takes it for.
    """
    if _sqlite_file(url) is not None:
        return optuna.storages.RDBStorage(url)
    url, found = _POSTGRESQL.subn("postgresql+psycopg://", url, count=1)
    options: dict[str, Any] = {"pool_pre_ping": True}  # a server may be started anew meanwhile
    if found:
        options["connect_args"] = {"connect_timeout": _CONNECT_S}
    attempts = 0
    while True:
        try:
            with warnings.catch_warnings():
                # Optuna marks heartbeats as experimental. We rely on them, and test them.
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.storages.RDBStorage(
                    url,
                    engine_kwargs=options,
                    heartbeat_interval=heartbeat.every_s,
                    grace_period=heartbeat.grace_s,
                )
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            attempts += 1
            if attempts == _OPENINGS:
                raise
            time.sleep(0.2 * attempts)


def _opened(
    storage: Storage, name: str, resume: bool, say: Say, heartbeat: Heartbeat
) -> optuna.storages.BaseStorage | None:
    opened: optuna.storages.BaseStorage | None
    mended = None
    try:
        if not isinstance(storage, str | Path):
            opened = storage
        elif is_journal(storage):
            opened, mended = open_journal(Path(storage))
        else:
            opened = _open_database(str(storage), heartbeat)
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
    refusal = None
    if name in names and not resume:
        refusal = _exists_already(storage)
    elif resume and names and not {name, name + _INITIAL} & set(names):
        refusal = StudyError(
            f"study storage {shown(storage)} holds no study of this model, clips, budget and "
            "settings to continue; leave out --resume to begin one"
        )
    if refusal is not None:
        close_database(opened)
        raise refusal
    return opened


def _exists_already(storage: Storage) -> StudyError:
    joined = "; --join helps the process that searches it" if is_shared(storage) else ""
    return StudyError(
        f"study storage {shown(storage)} holds a study of this search already: --resume "
        "continues it, another --output (or --storage, if you gave one) begins a new one" + joined
    )


def is_finished(trial: FrozenTrial) -> bool:
    """Return whether a trial has a result: a score, or the reason why there is none."""
    return "schedule" in trial.user_attrs and (
        trial.state == TrialState.COMPLETE
        or (trial.state == TrialState.FAIL and "failure" in trial.user_attrs)
    )


def finished(study: optuna.Study) -> tuple[FrozenTrial, ...]:
    """Return the finished trials, with those failed ones that store a reason."""
    states = (TrialState.COMPLETE, TrialState.FAIL)
    return tuple(filter(is_finished, study.get_trials(deepcopy=False, states=states)))


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
def quiet() -> Iterator[None]:
    """Silence Optuna's own log lines."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
