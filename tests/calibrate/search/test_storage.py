"""Storages that belong to one process, and those that several share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import toys

from calibrate.search.joining import join
from calibrate.search.storage import check_database, is_shared, lock_storage
from calibrate.search.storage_errors import StudyError


def test_database_servers_are_shared_and_files_are_not(tmp_path: Path) -> None:
    assert is_shared("postgresql://bob@host/base")
    assert is_shared("mysql+pymysql://bob@host/base")
    files = ("sqlite:///a.db", "sqlite+pysqlite:///a.db", "sqlite://", "a.journal", tmp_path, None)
    assert not any(map(is_shared, files))


def test_only_a_database_server_can_be_joined(tmp_path: Path) -> None:
    for storage in (f"sqlite:///{tmp_path}/a.db", str(tmp_path / "a.journal")):
        with pytest.raises(StudyError, match="belongs to one process, so no other can join"):
            join(storage, "a", 0, toys.additive)
    assert list(tmp_path.iterdir()) == []


def test_only_one_process_at_a_time_uses_a_database_in_a_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    with (
        lock_storage(url),
        pytest.raises(StudyError, match=r"another process is searching.*postgresql://"),
        lock_storage(url),
    ):
        raise AssertionError("two are at it")
    with lock_storage("sqlite://"), lock_storage("sqlite:///:memory:"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StudyError, match=r"pip install 'spark3r\[distributed\]'"):
        check_database("postgresql://bob:secret@nowhere/base")
