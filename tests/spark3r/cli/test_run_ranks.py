"""``spark3r run`` under torchrun: one clip over two ranks, written once; errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shared_clips

import spark3r
from spark3r.cli import main

pytestmark = pytest.mark.slow

ROOT = Path(spark3r.__file__).parents[1]


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(ROOT), str(Path(shared_clips.__file__).parent)]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "spark3r", "run", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def ours(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("spark3r: ")]


def test_two_ranks_write_what_one_process_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--clip", "rendered:7", "--frames", "5", "--json", "--output"]
    ended = torchrun(tmp_path, *words, "two")
    assert ended.returncode == 0, ended.stderr
    assert main(["run", *words, str(tmp_path / "one")]) == 0
    assert json.loads(ended.stdout)["ranks"] == 2
    assert json.loads(capsys.readouterr().out)["ranks"] == 1
    assert ours(ended.stderr).count("spark3r: dense pass") == 1
    run = json.loads((tmp_path / "two" / "run.json").read_text())
    assert (run["frames"], run["exit_status"]) == (5, 0)
    one, two = (
        {each.relative_to(tmp_path / name) for each in (tmp_path / name).rglob("*")}
        for name in ("one", "two")
    )
    assert one == two
    for name in ("depth/00000.npy", "depth/00004.npy", "confidence/00003.npy"):
        expected, found = (np.load(tmp_path / each / name) for each in ("one", "two"))
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    cameras = [
        [frame["extrinsics"] for frame in json.loads(file.read_text())["frames"]]
        for file in (tmp_path / "one/cameras.json", tmp_path / "two/cameras.json")
    ]
    np.testing.assert_allclose(*cameras, atol=1e-4)


def test_a_rank_that_dies_ends_all_with_one_line(tmp_path: Path) -> None:
    words = ["--model", "shared_clips:make_dying", "--clip", "rendered:7", "--frames", "12"]
    ended = torchrun(tmp_path, *words, "--output", "out", "--log-json", "log")
    assert ended.returncode == 1
    # torchrun ends the other rank, which may come before it sees that one is missing.
    told = ("another rank ended before the pass did", "terminated: nothing was written")
    failures = [line for line in ours(ended.stderr) if any(each in line for each in told)]
    assert len(failures) == 1, ended.stderr
    assert ours(ended.stderr)[-1] == failures[0]
    assert not (tmp_path / "out").exists()
    last = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert last["stage"] == "run"
    assert last["error"]


def test_an_error_of_all_ranks_is_told_once(tmp_path: Path) -> None:
    words = ["--profile", "nowhere.json", "--clip", "rendered:7", "--output", "out"]
    ended = torchrun(tmp_path, *words)
    assert ended.returncode == 1
    assert len(ours(ended.stderr)) == 1, ended.stderr
    assert "nowhere.json" in ours(ended.stderr)[0]
