"""Processes that share the passes of a calibration, started by torchrun as a user does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_job
import torch

from calibrate.ranks import AloneTimer, Ranks, _signals_waiting
from spark3r.errors import Spark3rError
from spark3r.timing import Latency, Timer, Treatment

RANK = Path(tiny_job.__file__).with_name("tiny_ranks.py")
GOAL = ["--budget", "75%", "--json"]


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the tiny calibration in two ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(RANK)]
    paths = [str(RANK.parents[2]), str(RANK.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *launcher, *GOAL, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def without_times(path: Path) -> dict[str, Any]:
    profile = json.loads(path.read_text(encoding="utf-8"))
    runs = profile["measurements"][0]["schedules"]
    return {
        "schedules": profile["schedules"],
        "default": profile["default"],
        "sensitivity": profile["sensitivity"],
        "figures": [[run["schedule"], run["figures"]] for run in runs],
    }


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = torchrun(tmp_path, *tiny_job.JOB, "--output", "two.json")
    assert ended.returncode == 0, ended.stderr
    assert "2 ranks; latencies are taken in one of them" in ended.stderr
    assert json.loads(ended.stdout)["status"] == 0
    tiny_job.place(monkeypatch, tmp_path)
    assert tiny_job.main([*GOAL, *tiny_job.JOB, "--output", "one.json", "--quiet"]) == 0
    capsys.readouterr()
    assert without_times(tmp_path / "two.json") == without_times(tmp_path / "one.json")


@pytest.mark.slow
def test_a_rank_that_dies_ends_all_with_one_line(tmp_path: Path) -> None:
    words = [word.replace("tiny_job:make_tiny", "tiny_ranks:make_dying") for word in tiny_job.JOB]
    ended = torchrun(tmp_path, *words, "--output", "a.json", "--quiet")
    assert ended.returncode == 1
    ours = [line for line in ended.stderr.splitlines() if line.startswith("calibrate: ")]
    assert len(ours) == 1, ended.stderr
    # torchrun ends the other ranks, which may come before they see that one is missing.
    told = {1: "another rank ended before the calibration did", 143: "calibrate: terminated: "}
    assert told[json.loads(ended.stdout)["status"]] in ours[0]
    assert not (tmp_path / "a.json").exists()


def test_one_process_needs_no_connection() -> None:
    ranks = Ranks.of_environment()
    assert ranks == Ranks(0, 1)
    assert all(map(ranks.owns, range(5)))
    with ranks.connected():
        assert not torch.distributed.is_initialized()


def test_every_clip_belongs_to_one_rank() -> None:
    owners = [[Ranks(rank, 3).owns(number) for rank in range(3)] for number in range(7)]
    assert all(sum(each) == 1 for each in owners)


def test_signals_wait_for_the_end_of_an_exchange() -> None:
    reached: list[str] = []

    def exchange() -> None:
        with _signals_waiting():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        exchange()
    assert reached == ["the end"]


def test_latencies_are_taken_with_the_threads_of_one_process() -> None:
    threads: list[int] = []

    class Watching(Timer):
        def time_in_turns(
            self, treatments: list[Treatment], **options: object
        ) -> dict[str, Latency]:
            threads.append(torch.get_num_threads())
            raise Spark3rError("no clock")

    before = torch.get_num_threads()
    with pytest.raises(Spark3rError):
        AloneTimer(timer=Watching(), threads=before + 2).time_in_turns([])
    assert threads == [before + 2]
    assert torch.get_num_threads() == before
