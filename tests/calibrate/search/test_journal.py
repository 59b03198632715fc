"""A journal whose end was cut off is mended, and a search continues as if nothing had happened."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import toys
from optuna.storages.journal import JournalFileBackend

from calibrate.search import journal as journal_file
from calibrate.search.optimizer import Found, Score, SearchOptions, optimize
from calibrate.search.problem import LatencyLimit
from calibrate.search.storage import lock_storage
from calibrate.search.storage_errors import StudyError
from spark3r import Schedule, Spark3rWarning


def search(storage: Path, trials: int = 4, resume: bool = False) -> Found:
    problem = toys.Problem(LatencyLimit(18.0))
    options = SearchOptions(trials, storage=storage, name="a", resume=resume)
    return optimize(problem, toys.starts(), toys.interacting, options)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "a.journal"
    search(path, trials=2)
    return path


def trials_in(content: bytes) -> int:
    """Return the finished trials of a journal, counted from its lines alone."""
    finished = (json.loads(line) for line in content.splitlines() if b'"state":1' in line)
    return len({each["trial_id"] for each in finished})


@pytest.mark.parametrize(
    "tail", [b'{"op_code":8,"worker_id":"x', b"{", b"\0" * 4096, b"\xff\xfe", b"12", b"{}", b"[[["]
)
def test_what_a_failed_write_left_is_removed(journal: Path, tail: bytes) -> None:
    whole = journal.read_bytes()
    journal.write_bytes(whole + tail)
    told = rf"the last {len(tail)} bytes are removed; {trials_in(whole)} finished trials"
    with pytest.warns(Spark3rWarning, match=told):
        found = search(journal, resume=True)
    assert journal.read_bytes().startswith(whole)
    assert found == search(journal.with_name("undisturbed.journal"))
    assert search(journal, resume=True) == found  # it is whole now, so nothing warns
    assert not list(journal.parent.glob("*.damaged"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_journal_continues_from_its_last_whole_line(
    journal: Path, share: float
) -> None:
    content = journal.read_bytes()
    size = int(share * len(content))
    journal.write_bytes(content[:size])
    kept = trials_in(content[: content[:size].rfind(b"\n") + 1])
    if size:
        with pytest.warns(Spark3rWarning, match=f"; {kept} finished trials of this search"):
            found = search(journal, resume=True)
    else:
        found = search(journal, resume=True)
    assert found == search(journal.with_name("undisturbed.journal"))


@pytest.mark.parametrize("lines", [0, 1, 2, 3])
def test_a_search_that_stopped_before_its_first_trial_is_continued(
    journal: Path, lines: int
) -> None:
    content = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(content[:lines]))
    found = search(journal, resume=True)
    assert found == search(journal.with_name("undisturbed.journal"))


@pytest.mark.parametrize(
    "content", [b"notes of mine", b"SQLite format 3\0" + bytes(100), b'{"a": 1}\n', b"[1]\n[2]"]
)
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(StudyError, match=r"a\.txt: cannot be opened \(it exists and is no journal"):
        search(path, resume=True)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b'{"op_', b'{"op_code":0,"worker_id":', b"\0" * 512])
def test_a_journal_without_a_whole_line_begins_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.journal"
    path.write_bytes(content)
    with pytest.warns(Spark3rWarning, match="0 finished trials of this search are kept"):
        found = search(path, resume=True)
    assert found == search(tmp_path / "undisturbed.journal")


def test_lines_after_a_broken_one_are_kept_in_another_file(journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    broken = [lines[-3][:20] + lines[-2], lines[-1]]
    journal.write_bytes(b"".join(lines[:-3] + broken))
    with pytest.warns(Spark3rWarning, match=r"kept in .*a\.journal\.damaged"):
        search(journal, resume=True)
    assert journal.with_name("a.journal.damaged").read_bytes() == b"".join(broken)


def test_a_search_that_stops_at_any_write_ends_like_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search(tmp_path / "whole.journal")
    append, path = JournalFileBackend.append_logs, tmp_path / "stopped.journal"
    left = 0

    def filling(self: JournalFileBackend, logs: list[dict[str, object]]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            with path.open("ab") as file:
                file.write(json.dumps(logs[0]).encode()[: -left % 40])
            raise OSError(28, "No space left on device")
        append(self, logs)

    for writes in range(3, 60, 7):
        path.unlink(missing_ok=True)
        left = writes
        with monkeypatch.context() as patch:
            patch.setattr(JournalFileBackend, "append_logs", filling)
            with pytest.raises(StudyError, match=r"stopped\.journal.*No space left"):
                search(path)
        with pytest.warns(Spark3rWarning, match="finished trials of this search are kept"):
            assert search(path, resume=True) == whole, writes


def test_a_search_that_stops_after_a_correction_decides_again_as_it_did(tmp_path: Path) -> None:
    problem = toys.Problem(LatencyLimit(18.0))
    options = SearchOptions(3, storage=tmp_path / "a.journal", name="a")
    corrected = replace(options, trials=0, resume=True, corrected=True)
    again = {"again": Schedule.uniform(4, 2, 4)}

    def nothing_new(schedule: Schedule) -> Score:
        raise AssertionError(f"{schedule} ran already")

    first = optimize(problem, toys.starts(), toys.interacting, options)
    second = optimize(problem, again, toys.interacting, corrected)
    assert len(second.trials) == len(first.trials) + 1
    resumed = replace(options, resume=True)  # the process was killed at this point
    assert optimize(problem, toys.starts(), nothing_new, resumed) == first
    assert optimize(problem, again, nothing_new, corrected) == second


@pytest.mark.slow
def test_the_lock_of_a_killed_writer_does_not_hold_up_a_search(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(journal.parents[1])
    monkeypatch.setattr(journal_file, "GRACE_S", 3)
    relative = journal.relative_to(Path.cwd())
    os.symlink(journal, f"{journal}.lock")
    begin = time.monotonic()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search(relative, resume=True)
    assert time.monotonic() - begin < 30
    assert [path.name for path in journal.parent.iterdir()] == ["a.journal"]


def test_a_whole_journal_is_not_touched(journal: Path) -> None:
    before = journal.stat().st_mtime_ns
    with lock_storage(journal):
        journal_file.open_journal(journal)
    assert journal.stat().st_mtime_ns == before
