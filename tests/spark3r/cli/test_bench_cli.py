"""``spark3r bench`` on the command line: results on stdout, mistakes in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from profile_documents import reference_profile
from small_models import make_model

from spark3r.cli.main import main


def tiny() -> object:
    return make_model()


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "tiny_bench_model", sys.modules[__name__])
    return "tiny_bench_model:tiny"


def test_a_table_or_one_json_object(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "--model", tiny_model, "--frames", "3,5", "--grid", "2x2"]
    arguments += ["--schedules", "dense,uniform:2:2,wall", "--rounds", "2"]
    path = tmp_path / "speed.json"
    assert main([*arguments, "--json", "--output", str(path)]) == 0
    told = capsys.readouterr()
    printed = json.loads(told.out)
    assert printed == json.loads(path.read_text(encoding="utf-8"))
    assert len(printed["rows"]) == 6
    assert "5 frames, wall" in told.err
    assert not list(tmp_path.glob("*.partial"))
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "speed-up" in out
    assert "milliseconds by part" in out
    assert "dense: time grows with frames to the power of" in out


def test_a_warning_is_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text(json.dumps(reference_profile()))
    arguments = ["bench", "--frames", "2,3", "--schedules", "./mine.json", "--rounds", "1"]
    assert main(arguments) == 0
    told = capsys.readouterr().err
    assert told.count("spark3r: note: the profile is a paper's schedule and was not measured") == 1
    assert "Spark3rWarning" not in told


def test_half_precision_is_autocast(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Casting the parameters fails in VGGT's and π³'s own heads.
    arguments = ["bench", "--model", tiny_model, "--frames", "2", "--grid", "2x2", "--json"]
    assert main([*arguments, "--schedules", "wall", "--rounds", "1", "--dtype", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float32, autocast bfloat16"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--model", "nonesuch"], 1, "no model is called 'nonesuch'"),
        (["--model", "json:loads"], 1, "expected a torch.nn.Module|loads() raised"),
        (["--frames", "0"], 2, "expected an integer of at least 1"),
        (["--frames", "8,many"], 2, "'many', expected an integer"),
        (["--schedules", "dense,,wall"], 2, "expected names with commas"),
        (["--schedules", "papr"], 1, "no schedule is called 'papr', expected dense"),
        (["--schedules", "uniform:four:16"], 1, "expected uniform:QUERY:KEY_VALUE"),
        (["--schedules", "uniform:0:16"], 1, "query factor is 0"),
        (["--schedules", "nowhere/profile.json"], 1, "nowhere/profile.json"),
        (["--schedules", "vggt-1b"], 1, "does not fit the model"),
        (["--schedules", "paper", "--sensitive", "99"], 1, "outside the 2 global layers"),
        (["--sensitive", "first"], 2, "expected layer numbers"),
        (["--device", "toaster"], 1, "device 'toaster' cannot be used"),
        (["--device", "meta"], 1, "computes nothing"),
        (["--dtype", "int8"], 2, "invalid choice"),
        (["--backend", "warp"], 2, "invalid choice"),
        (["--grid", "0x4"], 2, "expected rows x columns"),
        (["--rounds", "0"], 2, "expected an integer of at least 1"),
        (["--output", "no/such/folder/x.json"], 1, "there is no folder"),
        (["--output", "."], 1, "is a folder"),
    ],
)
def test_mistakes_are_reported_and_nothing_is_measured(
    tiny_model: str,
    arguments: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = ["bench", "--model", tiny_model, "--frames", "2", "--grid", "1x1", *arguments]
    try:
        got = main(whole)
    except SystemExit as leaving:  # argparse
        got = leaving.code
    told = capsys.readouterr()
    assert got == status
    assert any(part in told.err for part in message.split("|")), told.err
    assert "Traceback" not in told.err
    assert "internal error" not in told.err
    assert told.out == ""


def test_an_existing_file_is_kept_unless_told_otherwise(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kept.json"
    path.write_text("mine", encoding="utf-8")
    arguments = ["bench", "--model", tiny_model, "--frames", "2", "--grid", "2x2"]
    arguments += ["--schedules", "wall", "--rounds", "1", "--output", str(path)]
    assert main(arguments) == 1
    assert "exists: choose another name, or pass --overwrite" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "mine"
    assert main([*arguments, "--overwrite"]) == 0
    assert json.loads(path.read_text(encoding="utf-8"))["rows"][0]["schedule"] == "wall"
