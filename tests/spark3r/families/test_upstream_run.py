"""A video through a model's real code, from the command line to files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_line import run
from family_cases import ALL_CASES, missing
from footage_files import frames_of, write_video

REAL_DA3 = next(case for case in ALL_CASES if case.name == "da3-small-upstream")


@pytest.mark.skipif(
    bool(missing(REAL_DA3)), reason="NOT VERIFIED: depth-anything-3 is not installed"
)
def test_a_video_through_the_real_depth_anything_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "tour.mp4", frames_of(3, 3, 28, 504))
    answer = run(
        *("run", "--model", "da3:random-small", "--clip", "tour.mp4", "--output", "out", "--json")
    )
    assert answer.status == 0, answer.err
    assert (answer.object["height"], answer.object["width"]) == (28, 504)
    assert (answer.object["weights"], answer.object["random_weights"]) == ("random", True)
    assert len(json.loads(Path("out/cameras.json").read_text())["frames"]) == 3
    assert len(list(Path("out/depth").iterdir())) == 3
    assert Path("out/points.ply").stat().st_size > 15 * 3 * 28 * 504 // 2
