"""The journal file that stores a search's trials, and mending one that was cut off.

Each line of a journal is one operation as JSON, in the order in which they happened. A disk that
fills up, a kill or a power failure may leave half a line or zero bytes at its end. Whatever is
appended to that makes the file unreadable, so the end is removed before.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

GRACE_S = 10
"""Seconds after which the lock of a writer that writes nothing counts as left by a killed one. A
line is written in milliseconds."""


_BEGIN = b'{"op_code":'
"""Beginning of every line of a journal."""


def open_journal(path: Path) -> tuple[optuna.storages.BaseStorage, str | None]:
    """Open a journal file, and mend it if its end was cut off.

    Returns:
        The storage, and what was done to mend it, None if the file is whole.

    Raises:
        OSError: If the file cannot be read or written.
        ValueError: If the file is no journal.
    """
    # With a relative path Optuna would wait forever for a lock that a killed process left.
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileSymlinkLock(str(path), grace_period=GRACE_S)
    mended = _mend(path, lock) if path.exists() else None
    with warnings.catch_warnings():
        # Optuna marks the journal as experimental. We rely on its file format, and test it.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        backend = JournalFileBackend(str(path), lock_obj=lock)
        return optuna.storages.JournalStorage(backend), mended


def _mend(path: Path, lock: JournalFileSymlinkLock) -> str | None:
    """Cut a journal back to its last whole line, and return what was done, None if nothing.

    Whole lines after a broken one are of no use, since each depends on all before it. They are kept
    in another file all the same.
    """
    if _whole_bytes(path) == path.stat().st_size:
        return None
    lock.acquire()
    try:  # another process may have been writing a moment ago
        whole, size = _whole_bytes(path), path.stat().st_size
        if whole == size:
            return None
        with path.open("r+b") as file:
            file.seek(whole)
            rest = file.read()
            begin = rest[: len(_BEGIN)].rstrip(b"\0")
            if whole == 0 and not _BEGIN.startswith(begin):  # perhaps a database, or a text
                raise ValueError("it exists and is no journal of trials")
            done = f"a line was broken off, so the last {size - whole} bytes are removed"
            if b"\n" in rest:
                kept = path.with_name(f"{path.name}.damaged")
                with kept.open("ab") as copy:
                    copy.write(rest)
                done += f" and kept in {kept}"
            file.truncate(whole)
            file.flush()
            os.fsync(file.fileno())
        return done
    finally:
        lock.release()


def _whole_bytes(path: Path) -> int:
    """Return the length in bytes of the whole lines at the beginning of a journal."""
    whole = 0
    with path.open("rb") as file:
        for line in file:
            if not (line.endswith(b"\n") and _is_operation(line)):
                break
            whole += len(line)
    return whole


def _is_operation(line: bytes) -> bool:
    try:
        operation = json.loads(line)
    except (ValueError, RecursionError):  # also bytes that are not UTF-8
        return False
    return isinstance(operation, dict) and isinstance(operation.get("op_code"), int)
