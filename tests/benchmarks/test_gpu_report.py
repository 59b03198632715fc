"""The report of a GPU run, from made-up lines: whole, failed, partial and torn files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_scripts import script

Row = dict[str, Any]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script(monkeypatch, "gpu_report")


def passes(what: str, ms: list[float], frames: int = 1000, **values: Any) -> list[Row]:
    own = {"stage": "speed", "figure": "pass", "what": what, "frames": frames}
    return [{**own, "ms": each, "peak_gb": 30.5, "extra_gb": 23.0, **values} for each in ms]


def ones(kernel: str, difference: float = 0.0) -> Row:
    own = {"stage": "exact", "figure": "ones", "kernel": kernel, "how": "applied"}
    return {**own, "difference": {"depth": difference, "pose_enc": 0.0}}


def whole() -> list[Row]:
    """A run that reaches everything that must be reached."""
    attention = {"queries": 264_000, "keys": 41_640, "ms": 90.0, "tflops": 500.0, "ran": "sdpa"}
    attention |= {"kernel": "cudnn", "largest_error": 2e-3}
    layer = {"queries": 65_536, "keys": 1_041_000, "ms": 508.0, "mass": None}
    difference = {"depth": 1e-3}
    twin = {"figure": "plain twin", "operation": "matching", "difference": difference}
    env: list[Row] = [
        {"figure": "environment", "gpus": ["NVIDIA H200"], "packages": {"torch": "2.11.0"}},
        {"figure": "kernels", "kernels": []},
        {"figure": "product", "tflops": 780.0},
        {"figure": "copy", "tb_per_s": 4.3},
    ]
    sdpa: list[Row] = [
        *({"figure": "attention", "mass": each, **attention} for each in ("joined", None)),
        {"figure": "attention", "mass": "masked", **attention},
        {"figure": "dense layer", **attention, **layer},
    ]
    twins = {"figure": "twins", "plain_ms": 12.0, "fused_ms": 4.0, "difference": 1e-7}
    ops: list[Row] = [
        {**twins, "operation": "norm and rotary embedding"},
        {**twins, "operation": "matching"},
        {"figure": "same places", "share": 0.9999},
        {"figure": "operation", "operation": "merging", "ms": 3.0, "repeats": True},
    ]
    exact: list[Row] = [
        {"figure": "guard", "agrees": True},
        *({"figure": "passes", "schedule": s, "twice": {"depth": 0.0}, "finite": True} for s in S),
        *({"figure": "waits", "schedule": s, "places": ["aggregator.py:12"]} for s in S),
        *({"figure": "saver", "schedule": s, "difference": {"depth": 0.0}} for s in S),
        {**twin, "schedule": "mass"},
        {"figure": "profile", "frames": 40, "kernels": [{"kernel": "k", "ms": 1.0, "calls": 2}]},
    ]
    past: list[Row] = [
        {"figure": "past", "step": step, "ms": ms}
        for step, ms in (("as it is", 8600.0), ("head", 8000.0), ("compiled", 7000.0))
    ]
    count = {"stage": "count", "figure": "count", "what": "paper", "frames": 1000}
    dense = {"stage": "dense", "kernel": "default", "ran": "cudnn_sdpa"}
    rows = [
        {"stage": "run", "figure": "run", "model": "vggt:random", "tiny": False},
        *staged("env", env),
        *staged("sdpa", sdpa),
        *staged("ops", ops),
        *staged("exact", exact),
        *(ones(kernel) for kernel in ("default", "cudnn", "flash", "efficient")),
        {"stage": "speed", "figure": "model", "family": "vggt", "layers": 24, "weights_gb": 4.8},
        *passes("paper", [9900.0, 8700.0, 8600.0]),  # the first one is cold
        *passes("wall", [9000.0, 8300.0, 8400.0]),
        *passes("mass", [9900.0, 8750.0]),
        *(row for f in (100, 300, 500) for row in passes("dense", [f * f / 5], f, **dense)),
        *staged("past", past),
        {"stage": "long", "figure": "card", "card_gb": 24, "frames": 270, "ms": 2500.0},
        *(row for f in (1500, 2000) for row in passes("paper", [9.0 * f], f, stage="long")),
        {**count, "total_gb": 29.8},
    ]
    stages = dict.fromkeys(row["stage"] for row in rows if row["stage"] != "run")
    ends = [{"stage": s, "figure": "end", "status": "done", "seconds": 1.0} for s in stages]
    return rows + ends


S = ("paper", "mass")


def staged(stage: str, rows: list[Row]) -> list[Row]:
    return [{"stage": stage, **row} for row in rows]


def printed(
    report: ModuleType, rows: list[Row], capsys: pytest.CaptureFixture[str], damaged: int = 0
) -> str:
    report.report(rows, damaged)
    return capsys.readouterr().out


def test_a_whole_run_reaches_everything(
    report: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = whole()
    assert report.missing(rows) == report.failures(rows) == []
    found = report.criteria(rows)
    assert all(each.met for each in found), found
    text = printed(report, rows, capsys)
    assert "## Failed" not in text
    assert "## Missing" not in text
    # Without its first pass: 8.65 s against a wall of 8.35 s.
    assert "| 1,000 | paper | 8.65 | 2 | 9.90 | 0.965 | 30.5 | 29.8 | 1.023 | - |" in text
    # 24 layers of 1,041,000 queries at 508 ms for 65,536, and the wall.
    assert "| 1,000 | dense, cudnn kernel (modelled) | 202 | 0 |" in text
    assert "| 100 | dense, default kernel | 2.00 |" in text


@pytest.mark.parametrize(
    ("spoil", "requirement"),
    [
        (ones("flash", 1e-3), "factors of 1 change no bit, kernel flash"),
        (ones("cudnn", float("nan")), "factors of 1 change no bit, kernel cudnn"),
        (passes("paper", [9500.0] * 9), "paper, 1000 frames: wall ÷ measured at least 0.95"),
        (passes("mass", [9500.0] * 9), "mass, 1000 frames: wall ÷ measured at least 0.95"),
        (passes("paper", [9100.0] * 9), "paper, 1000 frames, depth head: at most 9 s"),
        (passes("paper", [8600.0], peak_gb=34.0), "paper, 1000 frames: peak within 10% of"),
        (
            passes("dense", [2000.0], 100, stage="dense", kernel="cudnn", ran=None),
            "dense is named with its kernel",
        ),
    ],
)
def test_what_is_not_reached_is_said(
    report: ModuleType, spoil: Row | list[Row], requirement: str
) -> None:
    more = spoil if isinstance(spoil, list) else [spoil]
    (found,) = (
        each
        for each in report.criteria([*whole(), *more])
        if each.requirement.startswith(requirement)
    )
    assert found.met is False


def test_what_was_not_measured_is_missing_and_not_judged(
    report: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in report.EXPECTED:
        rows = [row for row in whole() if row["stage"] != stage]
        lost = report.missing(rows)
        assert len(lost) == len(report.EXPECTED[stage])
        assert all(each.startswith(f"{stage}: ") for each in lost)
        assert f"- {lost[0]}" in printed(report, rows, capsys)
    rows = [row for row in whole() if row["stage"] in ("run", "env")]
    assert all(each.met is None for each in report.criteria(rows))


def test_failures_are_listed(report: ModuleType) -> None:
    rows = whole()
    rows += [
        {"stage": "speed", "figure": "pass", "what": "mass", "frames": 1000, "error": "OOM: 9 GB"},
        {"stage": "dense", "figure": "pass", "what": "dense", "frames": 500, "left_out": "late"},
        {"stage": "past", "figure": "past", "step": "head", "missing": "no depth head"},
        {"stage": "long", "figure": "end", "status": "out of time", "seconds": 60.0},
        {"stage": "new", "figure": "card", "card_gb": 24},
    ]
    assert report.failures(rows) == [
        "speed: pass, mass, 1000: OOM: 9 GB",
        "dense: pass, dense, 500: late",
        "past: past, head: no depth head",
        "long: out of time after 60.0 s",
        "new: no line says how it ended",
    ]


def test_a_figure_that_failed_is_missing(report: ModuleType) -> None:
    rows = [
        {**row, "error": "RuntimeError: no kernel"} if row["figure"] == "twins" else row
        for row in whole()
    ]
    assert [each.partition(",")[0] for each in report.missing(rows)] == ["ops: figure twins"] * 2


def test_torn_files_are_read_as_far_as_they_go(
    report: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, empty = tmp_path / "gpu.jsonl", tmp_path / "empty.jsonl"
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in whole()).encode()
    empty.write_bytes(b"")
    for end in range(0, len(content), 997):  # cut anywhere
        path.write_bytes(content[:end])
        rows, damaged = report.read_lines(path)
        assert len(rows) + damaged == len(content[:end].splitlines())
        assert damaged <= 1
        assert rows == whole()[: len(rows)]
        report.report(rows, damaged)
    path.write_bytes(content[:500] + b'\xff\xfe\n{"stage": 3, "figure": 1}\n[1]\nnull\n')
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(path), str(empty)])
    report.main()
    assert "4 damaged lines were left out" in capsys.readouterr().out


def test_a_file_that_is_not_there_is_named(
    report: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "nowhere.jsonl"])
    with pytest.raises(SystemExit):
        report.main()
    assert "nowhere.jsonl cannot be read" in capsys.readouterr().err
