"""SIGTERM ends a command in the usual way, and nothing stays behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from command_line import run

from spark3r.cli.termination import Terminated, raise_on_sigterm


def test_the_signal_is_raised_once_and_then_ignored() -> None:
    cleaned = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append("whole")

    with pytest.raises(Terminated), raise_on_sigterm():
        work()
    assert cleaned == ["whole"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_handler_of_the_program_stays() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with raise_on_sigterm():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_other_threads_are_left_alone() -> None:
    entered = []

    def enter() -> None:
        with raise_on_sigterm():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [True]


@pytest.mark.parametrize(
    ("number", "word", "status"),
    [(signal.SIGTERM, "terminated", 143), (signal.SIGINT, "interrupted", 130)],
)
@pytest.mark.parametrize("where", ["spark3r.reconstruction.reconstruct", "numpy.save"])
def test_a_stopped_run_writes_nothing(
    number: signal.Signals,
    word: str,
    status: int,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(where, lambda *args, **options: signal.raise_signal(number))
    monkeypatch.chdir(tmp_path)
    answer = run(
        *("run", "--model", "reference", "--clip", "rendered:7", "--frames", "2"),
        *("--output", "out"),
    )
    assert answer.status == status
    assert answer.err.splitlines()[-1] == (
        f"spark3r: {word}: nothing was written, so the same command starts again"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["spark3r.benchmark.api.bench", "os.replace"])
def test_a_stopped_benchmark_keeps_the_file_that_was_there(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(where, lambda *args, **options: signal.raise_signal(signal.SIGTERM))
    file = tmp_path / "a.json"
    file.write_text("of another day")
    answer = run(
        *("bench", "--frames", "2", "--rounds", "1", "--schedules", "dense"),
        *("--output", str(file), "--overwrite"),
    )
    assert answer.status == 143
    assert "is there and whole" in answer.err
    assert file.read_text() == "of another day"
    assert list(tmp_path.iterdir()) == [file]


def test_a_process_that_gets_the_signal_ends_with_the_usual_status() -> None:
    program = (
        "import signal, sys, spark3r.profile\n"
        "spark3r.profile.load_profile = lambda *_: signal.raise_signal(signal.SIGTERM)\n"
        "from spark3r.cli import main\n"
        "sys.exit(main(['check', 'a.json']))\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 143, answer.stderr
    assert answer.stderr.startswith("spark3r: terminated: ")
