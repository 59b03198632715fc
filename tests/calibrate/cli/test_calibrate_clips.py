"""From files on the command line to clips by role."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_job
from footage_files import write_images, write_video
from tiny_job import Notes, main

from calibrate.cli.clips import read_split, reader, rendered_split
from calibrate.clips import Split
from calibrate.defaults import STRETCHES
from calibrate.progress import Reporter
from spark3r import ClipError, Profile
from spark3r.families.reference import FAMILY
from spark3r.reference.scenes.seeds import CALIBRATION, EVALUATION

FRAMES = 4


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny_job.place(monkeypatch, tmp_path)


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 48, 64, 3), dtype=np.uint8)


def folder(path: Path, count: int, seed: int = 0) -> Path:
    return write_images(path, pixels(count, seed), "{}.png")


def read(sources: list[Path], held_out: list[Path], skip_bad: bool = False) -> tuple[Split, list]:
    notes = Notes()
    names = [[str(path) for path in paths] for paths in (sources, held_out)]
    split = read_split(*names, FRAMES, reader(FAMILY, 16, skip_bad), notes)
    return split, notes.lines


def starts(clips: tuple) -> list[str]:
    return [clip.name.partition("[")[2].rstrip("]") for clip in clips]


def test_one_folder_serves_all_roles_in_separate_stretches(tmp_path: Path) -> None:
    split, said = read([folder(tmp_path / "walk", 100)], [])
    parts = [f"{first}:{first + 4}" for first in range(0, 64, 4)]
    assert starts(split.search) == parts[:8]
    assert starts(split.validation) == parts[8:12]
    assert starts(split.held_out) == parts[12:]
    assert sum(clip.frames for clip in split.clips) == STRETCHES * FRAMES
    assert len({clip.digest() for clip in split.clips}) == STRETCHES
    assert said == ["clips of 4 frames: search 8, validation 4, held out 4"]


def test_short_footage_is_cut_as_it_is(tmp_path: Path) -> None:
    split, _ = read([folder(tmp_path / "walk", 9)], [])
    assert [len(part) for part in (split.search, split.validation, split.held_out)] == [2, 1, 1]
    assert sum(clip.frames for clip in split.clips) == 9
    with pytest.raises(ClipError, match="has 3 frames, expected at least 8 to cut it into 4"):
        read([folder(tmp_path / "glance", 3)], [])


def test_held_out_footage_is_only_held_out(tmp_path: Path) -> None:
    split, _ = read([folder(tmp_path / "a", 40)], [folder(tmp_path / "b", 40, seed=1)])
    assert [clip.name.rpartition("/")[2] for clip in split.held_out] == ["b"]
    assert split.held_out[0].frames == FRAMES
    assert all(clip.name.rpartition("/")[2].startswith("a[") for clip in split.search)


def test_a_few_clips_have_one_role_each_and_are_cut(tmp_path: Path) -> None:
    split, _ = read([folder(tmp_path / str(n), 40, seed=n) for n in range(4)], [])
    names = [
        {clip.name.rpartition("/")[2].partition("[")[0] for clip in clips}
        for clips in (split.search, split.validation, split.held_out)
    ]
    assert names == [{"0", "1"}, {"2"}, {"3"}]
    assert [clip.frames for clip in split.clips] == [FRAMES] * STRETCHES


def test_many_clips_are_not_cut(tmp_path: Path) -> None:
    split, _ = read([folder(tmp_path / str(n), 6, seed=n) for n in range(STRETCHES)], [])
    assert [clip.frames for clip in split.clips] == [FRAMES] * STRETCHES


def test_a_video_is_cut_into_stretches(tmp_path: Path) -> None:
    split, _ = read([write_video(tmp_path / "walk.mp4", pixels(64))], [])
    assert len(split.clips) == STRETCHES
    assert {clip.images.shape[1] for clip in split.clips} == {3}


def test_unreadable_images_are_named_and_counted(tmp_path: Path) -> None:
    path = folder(tmp_path / "walk", 30)
    (path / "7.png").write_bytes(b"no image")
    with pytest.raises(ClipError, match=r"7\.png cannot be read .*--skip-bad"):
        read([path], [])
    split, said = read([path], [], skip_bad=True)
    assert len(split.skipped) == 1
    assert "1 unreadable and skipped (7.png" in said[0]


def test_default_clips_of_different_roles_have_different_seeds() -> None:
    seeds: list[str] = []
    inner = reader(FAMILY, 16, False)

    def noted(source: str, frames: int):
        seeds.append(source)
        return inner(source, 2)

    split = rendered_split(2, noted, Reporter())
    numbers = [int(seed.partition(":")[2]) for seed in seeds]
    reported = len(split.held_out)
    assert len(set(numbers)) == len(numbers) == len(split.clips)
    assert set(numbers[:-reported]) <= set(CALIBRATION)
    assert set(numbers[-reported:]) <= set(EVALUATION)


SHORT = ["--frames", "4", "--size", "16", "--target-frames", "64", "--trials", "1", "--quiet"]


@pytest.mark.slow
def test_a_folder_is_calibrated_on_without_ground_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path / "walk", 16)
    (path / "3.png").write_bytes(b"no image")
    job = ["--budget", "75%", "--model", "tiny_job:make_tiny", *SHORT, "--clip", str(path)]
    assert main([*job, "--output", "a.json"]) == 1
    assert "--skip-bad" in capsys.readouterr().err
    assert main([*job, "--output", "a.json", "--skip-bad"]) == 0
    assert "judged by deviation" in capsys.readouterr().out
    profile = Profile.load("a.json")
    assert "1 frames could not be read and were skipped" in profile.notes
    assert all(run.error is None for run in profile.measurements[0].dense.figures)


@pytest.mark.parametrize(
    ("count", "message"), [(0, "the folder holds no image"), (1, "expected at least 2")]
)
def test_footage_without_or_with_one_frame_is_refused(
    count: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path / "glance", count)
    job = ["--budget", "75%", "--model", "tiny_job:make_tiny", *SHORT, "--clip", str(path)]
    assert main(job) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_few_or_short_clips_are_pointed_out(tmp_path: Path) -> None:
    split, _ = read([folder(tmp_path / "walk", 100)], [])
    assert split.doubts(16) == []
    (far,) = split.doubts(17)
    assert far.startswith("clips of 4 frames stand in for 17 frames.")
    assert "--frames" in far
    few, _ = read([folder(tmp_path / "glance", 9)], [])
    (few_to_validate,) = few.doubts(8)
    assert few_to_validate.startswith("1 validation clip(s) can hardly tell schedules apart")


def test_real_footage_asks_for_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for option in ("--clip", "--held-out"):
        assert main(["--budget", "75%", option, "tour.mp4"]) == 2
        told = capsys.readouterr().err
        assert told.startswith("calibrate: --clip tour.mp4 is real footage, so say with --model")
        assert "  --model vggt:facebook/VGGT-1B\n" in told
    assert list(tmp_path.iterdir()) == []
