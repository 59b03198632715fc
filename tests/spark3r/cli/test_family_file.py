"""A model described in a TOML file, from the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import run

import calibrate.cli

ROOT = Path(__file__).parents[3]

REFERENCE = """
attention = ["aggregator.global_blocks.[0-9].attn"]
entry = "aggregator"
patch_size = 8
special = 5
anchor_frame = 0
patches_overlap = true
like = "reference"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("my_model.toml").write_text(REFERENCE)
    return tmp_path


@pytest.mark.slow
def test_run_and_bench_take_a_described_model() -> None:
    scene = ("run", "--clip", "rendered:3", "--frames", "3", "--json")
    described = run(*scene, "--family", "my_model.toml", "--output", "a")
    assert described.status == 0, described.err
    assert described.object["family"] == "generic"
    assert run(*scene, "--output", "b").status == 0
    paths = [Path(name, "trajectory.txt").read_text().splitlines() for name in "ab"]
    poses = [[line for line in path if not line.startswith("#")] for path in paths]
    assert len(poses[0]) == 3
    assert poses[0] == poses[1]
    bench = ("bench", "--frames", "4", "--schedules", "dense,token_stride:1:2", "--rounds", "1")
    answer = run(*bench, "--family", "my_model.toml", "--json")
    assert answer.status == 0, answer.err


def test_the_example_in_the_documentation_is_right() -> None:
    page = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    Path("my_model.toml").write_text(example)
    answer = run("check", "vggt-1b", "--family", "my_model.toml")
    assert answer.status == 0, answer.err


WRONG = {
    "no such file": (None, "cannot be read: No such file"),
    "empty": ("", "attention is missing, expected a pattern"),
    "no TOML": ("attention = [", "is not TOML: "),
    "twice": ("special = 1\nspecial = 2", "is not TOML: "),
    "unknown key": ("attn = 'a'", "there is no 'attn', expected only: attention, patch_size"),
    "a number as pattern": ("attention = 3", "attention is 3, expected a pattern"),
    "no pattern": ("attention = []", "attention is [], expected a pattern"),
    "a patch of no pixels": ("patch_size = 0", "patch_size is 0, expected pixels, at least 1"),
    "a switch as number": ("special = true", "special is True, expected an integer of at least 0"),
    "a text as switch": ("special_last = 'no'", "special_last is 'no', expected true or false"),
    "below zero": ("tail = -1", "tail is -1, expected an integer of at least 0"),
    "an unknown family": ("like = 'dust3r'", "expected a family (reference, vggt, "),
    "no patch size": ("attention = 'a.*'", "patch_size is missing, expected pixels"),
    "a table": ("[model]\nattention = 'a'", "there is no 'model', expected only"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_ends_in_one_line(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    text, message = WRONG[name]
    Path("my_model.toml").unlink()
    if text is not None:
        Path("my_model.toml").write_text(text)
    commands = [
        ("run", "--clip", "rendered:3", "--output", "out"),
        ("bench", "--frames", "4", "--schedules", "dense"),
        ("check", "vggt-1b"),
    ]
    for command in commands:
        answer = run(*command, "--family", "my_model.toml")
        assert (answer.status, answer.out) == (1, "")
        assert answer.err.startswith("spark3r: my_model.toml")
        assert message in answer.err
        assert answer.err.count("\n") == 1
    assert not Path("out").exists()
    assert calibrate.cli.main(["--budget", "2x", "--family", "my_model.toml"]) == 1
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe", "is not a text in UTF-8"),
        (b"#" * 200_000, "has more than 100000 bytes"),
        (b"a = " + b"[" * 5000, "is not TOML"),
    ],
)
def test_a_file_of_another_kind_ends_in_one_line(text: bytes, message: str) -> None:
    Path("my_model.toml").write_bytes(text)
    answer = run("check", "vggt-1b", "--family", "my_model.toml")
    assert (answer.status, answer.err.count("\n")) == (1, 1)
    assert message in answer.err


def test_a_pattern_that_matches_nothing_and_an_unknown_name_are_told() -> None:
    bench = ("bench", "--frames", "4", "--schedules", "dense")
    answer = run(*bench, "--family", "vgt")
    assert (answer.status, answer.err.count("\n")) == (1, 1)
    assert "no family is named 'vgt'" in answer.err
    assert "does not have the structure of family 'vggt'" in run(*bench, "--family", "vggt").err
    Path("my_model.toml").write_text("attention = 'blocks.*'\npatch_size = 8")
    answer = run(*bench, "--family", "my_model.toml")
    assert (answer.status, answer.err.count("\n")) == (1, 1)
    assert "no module of ReferenceModel matches" in answer.err
