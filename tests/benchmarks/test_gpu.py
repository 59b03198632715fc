"""The GPU run in small: every stage ends on a CPU, and no stage takes others down with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch._dynamo
from benchmark_scripts import FOLDER, environment, script

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")

NONE = "import sys"
HANGS = "import time; time.sleep(60)"
TEARS = (
    'import os, signal, sys; open(sys.argv[1], \'a\').write(\'{"stage": "ops", "fig\');'
    "os.kill(os.getpid(), signal.SIGSEGV)"
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script(monkeypatch, "gpu")


def lines_of(path: Path) -> list[dict[str, Any]]:
    rows, damaged = sys.modules["gpu_lines"].read_lines(path)
    assert damaged <= 1
    return rows


def test_a_stage_that_dies_or_hangs_ends_alone(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "gpu.jsonl"
    programs = {"env": NONE, "sdpa": "raise SystemExit(3)", "ops": TEARS, "exact": HANGS}
    limits = {name: 0.7 if name == "exact" else 60.0 for name in gpu.STAGES}
    monkeypatch.setattr(gpu, "STAGES", {name: ("", limit) for name, limit in limits.items()})

    def command(stage: str, seconds: float) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", programs.get(stage, NONE), str(path)]

    assert not gpu.run_stages((*programs, "speed"), path, 600.0, command, least_s=0.1)
    ends = {row["stage"]: row["status"] for row in lines_of(path)}
    assert ends == {
        "env": "done",
        "sdpa": "failed with code 3",
        "ops": f"failed with code -{int(signal.SIGSEGV)}",
        "exact": "out of time",
        "speed": "done",
    }
    torn = [line for line in path.read_text().splitlines() if line.endswith('"fig')]
    assert len(torn) == 1  # what followed it stands in a line of its own


def test_without_time_a_stage_is_not_begun(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    assert not gpu.run_stages(("env", "sdpa"), path, 5.0, lambda *_: ["false"], least_s=6.0)
    assert [row["status"] for row in lines_of(path)] == ["not begun"] * 2


@pytest.mark.slow
def test_processes_of_a_stage_end_with_it(gpu: ModuleType, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = f"sleep 60 & echo $! > {pid}; wait"
    assert gpu.run_command(["sh", "-c", program], 2.0) == "out of time"
    child = int(pid.read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or ") Z" in state.read_text():
            return
        time.sleep(0.05)
    pytest.fail("a process that the stage started still runs")


def test_an_unknown_stage_is_refused(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", "x", "--stages", "env,speeds"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "expected some of env,sdpa" in capsys.readouterr().err


def test_an_error_becomes_a_line(gpu: ModuleType, tmp_path: Path) -> None:
    lines = gpu.Lines(tmp_path / "gpu.jsonl", "ops")
    with lines.guarded("twins", operation="matching"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")
    with lines.guarded("twins", operation="merging"):
        lines.put("twins", operation="merging", ms=float("nan"))
    first, second = lines_of(lines.path)
    assert first["error"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert (first["stage"], first["figure"], first["operation"]) == ("ops", "twins", "matching")
    assert "error" not in second


@pytest.mark.slow
@pytest.mark.dynamo
def test_every_stage_runs_in_small(
    gpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "gpu.jsonl"
    torch._dynamo.reset()
    for stage in gpu.STAGES:  # in this process, where torch is there already
        own = ["--stage", stage, "--output", str(tmp_path), "--tiny"]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *own])
        gpu.main()
    torch._dynamo.reset()
    rows = lines_of(path)
    # Without Triton the two fused kernels have no figure.
    assert {row["figure"] for row in rows if "error" in row} <= {"twins"}
    report = script(monkeypatch, "gpu_report")
    own_lengths = ("frames", "kernel")
    for stage, figures in report.EXPECTED.items():
        for wanted in figures:
            if wanted["figure"] in ("profile", "twins"):
                continue  # the first needs a GPU
            small = {name: value for name, value in wanted.items() if name not in own_lengths}
            assert any(report.fits(row, small) for row in rows if row["stage"] == stage), wanted
    for row in report.chosen(rows, "ones"):
        assert set(row["difference"].values()) == {0.0}, row
    assert all(row["largest_error"] < 1e-5 for row in report.chosen(rows, "attention"))
    capsys.readouterr()
    report.report([{"stage": "run", "figure": "run", "tiny": True}, *rows], 0)
    printed = capsys.readouterr().out
    assert "Tiny sizes" in printed
    assert "What must be reached" not in printed


@pytest.mark.slow
def test_the_command_runs_a_stage(tmp_path: Path) -> None:
    """A process of its own, with pydantic missing, as on a bare machine."""
    (tmp_path / "pydantic.py").write_text("raise ImportError('pydantic is not here')")
    paths = os.pathsep.join((str(tmp_path), environment()["PYTHONPATH"]))
    command = [sys.executable, str(FOLDER / "gpu.py"), "--tiny", "--stages", "exact"]
    subprocess.run(
        [*command, "--output", str(tmp_path / "out")],
        env={**environment(), "PYTHONPATH": paths},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    path = tmp_path / "out" / "gpu.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["figure"] == "run"
    assert rows[-1]["status"] == "done"
    assert {"ones", "passes", "plain twin"} <= {row["figure"] for row in rows}
