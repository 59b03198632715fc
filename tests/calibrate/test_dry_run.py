"""The plan of a calibration comes at once, and counts what the calibration does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calibrate import dry_run
from calibrate.cli.main import main
from calibrate.clips import split_clips
from calibrate.defaults import OPERATORS, TIMED_KEY_VALUE_FACTORS, TIMED_QUERY_FACTORS
from calibrate.measure.timing import passes_to_time
from spark3r.clips import Clip
from spark3r.profile import load_profile


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["--dry-run", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_the_plan_of_the_readme_s_command_has_times(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    out = planned(capsys, "--budget", "30ms")
    assert out.startswith("--budget 30ms, judged by error, timed on clips of 512 frames\n")
    assert "selection: 64 runs of 24 frames, about" in out
    total = float(out.partition("in all about ")[2].partition(" s ")[0])
    assert total == pytest.approx(170, rel=0.25)  # the README's figure
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "1x"], "dense meets it as it is"),
        (["--budget", "100%", "--model", "vggt:facebook/VGGT-1B"], "dense meets it as it is"),
        (["--budget", "5s"], "dense probably meets it"),
        (["--budget", "30ms", "--target-frames", "128"], "dense probably meets it"),
        (["--budget", "1ms"], "can probably not be reached"),
    ],
)
def test_what_is_pointless_is_not_planned(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = planned(capsys, *arguments)
    assert message in out
    assert "search:" not in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "vggt:facebook/VGGT-1B"],
        ["--device", "cuda"],
        ["--size", "256"],
        ["--clip", "tour.mp4", "--model", "reference"],
    ],
)
def test_no_times_where_they_are_not_known(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tour.mp4").touch()
    out = planned(capsys, "--budget", "40%", "--json", *arguments)
    lines = json.loads(out)["plan"]
    assert any(line.startswith("search: ") and line.endswith("runs of 24 frames") for line in lines)
    assert lines[0].endswith("timed on clips of 128 to 1024 frames")
    assert ("judged by deviation" in lines[0]) == ("--clip" in arguments)


def test_footage_that_is_missing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--budget", "2x", "--clip", "no/such.mp4", "--model", "reference"]
    assert main(["--dry-run", *job]) == 1
    assert "clip 'no/such.mp4': there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("held_out", [0, 1, 5])
@pytest.mark.parametrize("sources", [1, 2, 3, 4, 5, 7, 16, 17, 30])
def test_clips_are_counted_as_they_are_split(sources: int, held_out: int) -> None:
    counts = dry_run.clip_counts(sources, held_out)
    roles = 3 if held_out else 4
    stretches = max(-(-16 // sources), roles if sources < roles else 1)  # as footage is read
    frames = 2

    def clip(name: str, stretches: int) -> Clip:
        return Clip(name, torch.zeros(stretches * frames, 3, 8, 8))

    split = split_clips(
        [clip(f"a{number}", stretches) for number in range(sources)],
        [clip(f"b{number}", 1) for number in range(held_out)],
        frames,
    )
    assert counts == (len(split.search), len(split.validation), len(split.held_out))


def test_the_numbers_are_those_of_the_steps() -> None:
    passes = passes_to_time(8, OPERATORS, TIMED_QUERY_FACTORS, TIMED_KEY_VALUE_FACTORS)
    assert len(passes) == 2 + dry_run.OTHER_PASSES
    for kind, profile in {
        "reference": "reference",
        "vggt": "vggt-1b",
        "omega": "vggt-omega-1b",
        "pi3": "pi3",
        "da3": "da3-giant",
        "mapanything": "map-anything",
        "worldmirror": "worldmirror-2",
        "panovggt": "panovggt",
    }.items():
        assert dry_run.DEPTHS[kind] == len(load_profile(profile).model.global_layers)


def test_a_plan_does_not_wait_for_heavy_imports() -> None:
    program = (
        "import sys\n"
        "from calibrate.cli.main import main\n"
        "assert main(['--dry-run', '--budget', '2.5x']) == 0\n"
        "heavy = {'torch', 'optuna', 'pandas', 'scipy', 'matplotlib', 'numpy', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
