"""The scripts that try to break the package run, find nothing, and would report what they find."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_scripts import environment, script

from spark3r.profile import Profile

pytestmark = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")

SLOW_MACHINE_S = 15.0
"""Limit of a case in place of the scripts' own, which is meant for a quiet machine."""


@pytest.mark.slow
def test_malformed_profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    profiles = script(monkeypatch, "faults.profiles")
    monkeypatch.setattr(profiles, "MOST_SECONDS", SLOW_MACHINE_S)
    result = profiles.run(80, 7, tmp_path)
    assert result["faults"] == []
    assert result["outcomes"]["grammar, accepted"] > 0
    assert result["outcomes"]["bytes, refused"] > 0
    assert result["passes_with_a_new_rule"] > 0


@pytest.mark.parametrize(
    ("method", "replacement", "fault"),
    [
        ("load", lambda path: int("x"), "fault: ValueError: invalid literal for int()"),
        ("save", lambda self, path: Path(path).write_text("{}"), "fault: ProfileError"),
    ],
)
def test_a_fault_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, replacement: object, fault: str
) -> None:
    profiles = script(monkeypatch, "faults.profiles")
    monkeypatch.setattr(Profile, method, replacement)
    assert profiles.run(20, 7, tmp_path)["faults"][0]["fault"].startswith(fault)


def test_a_layer_that_the_oracle_does_not_confirm_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profiles = script(monkeypatch, "faults.profiles")
    reduced = profiles.reduced
    monkeypatch.setattr(
        profiles, "reduced", lambda *given: [each + 1e-6 for each in reduced(*given)]
    )
    faults = profiles.run(20, 7, tmp_path)["faults"]
    assert all(fault["fault"].endswith("off the oracle") for fault in faults)
    assert faults


@pytest.mark.slow
def test_hostile_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hostile = script(monkeypatch, "faults.hostile")
    monkeypatch.setattr(hostile, "MOST_SECONDS", SLOW_MACHINE_S)
    canary = tmp_path / "canary"
    for inner in ("profiles", "weights", "damaged"):
        (tmp_path / inner).mkdir()
    monkeypatch.chdir(tmp_path)
    cases = hostile.profiles(tmp_path / "profiles") + hostile.weights(tmp_path / "weights", canary)
    rows = hostile.read_all(cases, canary)
    assert [row for row in rows if not row["outcome"].startswith("refused: ")] == []
    assert hostile.damaged_weights(200, 7, tmp_path / "damaged", canary)["faults"] == []

    for call, fault in (
        (lambda: 1, "fault: accepted"),
        (lambda: int("x"), "fault: ValueError"),
        (canary.touch, "fault: its code ran"),
    ):
        (row,) = hostile.read_all([("a case", call)], canary)
        assert row["outcome"].startswith(fault)


FEW_PROCESSES = """
import sys
from faults import disk, kill, memory
few = ["--frames", "16", "--output"]
status = kill.main(["--share", "0.02", *few, "kill.json"])
status += disk.main(["--share", "0.1", "--command", "calibrate", *few, "disk.json"])
status += memory.main(["--share", "0.05", "--command", "run", *few, "memory.json"])
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_hundredth_of_the_faults_of_processes(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", FEW_PROCESSES],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert answer.returncode == 0, results
    assert results["kill"]["run"]["kills"] == results["kill"]["calibrate"]["kills"] == 1
    assert "two writers" in results["disk"]["calibrate"]["outcomes"]
    assert results["memory"]["run"]["outcomes"]["named"] > 0
