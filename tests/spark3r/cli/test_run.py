"""``spark3r run`` as users call it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from footage_files import frames_of, write_images, write_video
from profile_documents import reference_profile

from spark3r import Clip, Spark3rError
from spark3r.cli.main import main
from spark3r.io.clips import load_clip
from spark3r.loading.load import load_model
from spark3r.reconstruction import deviation, reconstruct
from spark3r.runner import Runner

FILES = [
    "cameras.json",
    "confidence",
    "depth",
    "points.ply",
    "preview",
    "run.json",
    "trajectory.txt",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def profile() -> str:
    Path("mine.json").write_text(json.dumps(reference_profile()))
    return "mine.json"


def test_a_rendered_scene_dense(folder: Path) -> None:
    answer = run("run", "--clip", "rendered:7", "--frames", "3", "--output", "out")
    assert answer.status == 0, answer.err
    assert sorted(path.name for path in Path("out").iterdir()) == FILES
    assert answer.out.startswith(
        "reference (weights reference), dense, 3 frames of 64x64, float32 on"
    )
    assert "written to out: depth/, confidence/, preview/" in answer.out
    clip = load_clip("rendered:7", "reference", frames=3).clip
    expected = Runner.of(load_model("reference")).predict(clip)
    depth = np.stack([np.load(f"out/depth/{i:05}.npy") for i in range(3)])
    assert np.array_equal(depth, expected.depth.numpy())


def test_a_video_reduced_and_compared(folder: Path, profile: str) -> None:
    write_video(folder / "tour.mp4", frames_of(3, 8))
    answer = run(
        *("run", "--clip", "tour.mp4", "--frames", "5", "--profile", profile, "--compare-dense"),
        *("--output", "out", "--json"),
    )
    assert answer.status == 0, answer.err
    record = answer.object
    assert json.loads(Path("out/run.json").read_text()) == record
    assert (record["frames"], record["height"], record["width"]) == (5, 56, 72)
    assert (record["profile"], record["schedule"], record["status"]) == (profile, "fast", "paper")
    assert record["seconds"] > 0
    assert record["dense"]["seconds"] > 0
    assert 0 < record["deviation"]["depth"] < 1
    assert record["notes"] == [
        line.removeprefix("spark3r: note: ")
        for line in answer.err.splitlines()
        if line.startswith("spark3r: note: ")
    ]
    assert any("`calibrate --model reference --budget 50%`" in note for note in record["notes"])
    assert json.loads(Path("out/cameras.json").read_text())["frames"][-1]["name"] == "frame 7"
    times = [float(line.split()[0]) for line in Path("out/trajectory.txt").read_text().splitlines()]
    assert times == pytest.approx([0.0, 0.2, 0.4, 0.5, 0.7], abs=0.051)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "vggt"}, "the profile is for family 'vggt', the model's is 'reference'"),
        ({"depth": 3}, "the profile is for 3 global layers"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused_before_footage_is_read(
    changes: dict, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = reference_profile()
    document["model"]["family"] = changes.get("family", "reference")
    if depth := changes.get("depth"):
        document["model"]["global_layers"] = document["model"]["global_layers"][:depth]
        for schedule in document["schedules"]:
            schedule["layers"] = schedule["layers"][:depth]
    Path("mine.json").write_text(json.dumps(document))

    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("footage was read")

    monkeypatch.setattr("spark3r.io.clips.load_clip", read)
    answer = run("run", "--clip", "rendered:7", "--profile", "mine.json", "--output", "out")
    assert answer.status == 1
    assert message in answer.err
    assert answer.err.count("\n") == 1
    assert not Path("out").exists()


def test_a_dense_schedule_deviates_by_nothing_and_says_so(folder: Path) -> None:
    document = reference_profile()
    document["schedules"][0]["length"]["min_frames"] = 50
    Path("long.json").write_text(json.dumps(document))
    answer = run(
        *("run", "--clip", "rendered:7", "--frames", "3", "--profile", "long.json"),
        *("--compare-dense", "--output", "out"),
    )
    assert answer.status == 0, answer.err
    assert "note: the schedule is dense at 3 frames: nothing is reduced" in answer.err
    assert "deviation from dense: depth 0.00%, rotation 0.000°" in answer.out


def test_frames_that_cannot_be_read_are_counted(folder: Path) -> None:
    write_images(folder / "photos", frames_of(3, 4))
    (folder / "photos" / "frame_2.png").write_text("no picture")
    answer = run("run", "--clip", "photos", "--output", "out")
    assert answer.status == 1
    assert "frame_2.png cannot be read (not an image)" in answer.err
    answer = run("run", "--clip", "photos", "--skip-bad", "--output", "out", "--json")
    assert answer.status == 0, answer.err
    assert answer.object["skipped"] == ["frame_2.png: not an image"]
    assert answer.object["frames"] == 3
    assert "spark3r: 1 unreadable and skipped: frame_2.png" in answer.err


def test_random_weights_are_named(folder: Path) -> None:
    answer = run(
        *("run", "--model", "reference:random", "--clip", "rendered:7", "--frames", "2"),
        *("--output", "out", "--max-points", "10", "--least-confident", "90%"),
    )
    assert answer.status == 0, answer.err
    assert "reference:random has random weights: its time and memory are meaningful" in answer.err
    assert answer.out.startswith("reference:random (random weights), dense")
    record = json.loads(Path("out/run.json").read_text())
    assert (record["weights"], record["random_weights"]) == ("random", True)
    assert 1 <= record["points"] <= 10


USAGE = [
    (("--output", "out"), "the following arguments are required: --clip"),
    (("--clip", "rendered:1"), "the following arguments are required: --output"),
    (("--clip", "rendered:1", "--output", "out", "--compare-dense"), "--compare-dense needs a"),
    (("--clip", "rendered:1", "--output", "out", "--schedule", "a"), "--schedule needs a --prof"),
    (("--clip", "rendered:1", "--output", "out", "--frames", "0"), "expected an integer of at"),
    (("--clip", "rendered:1", "--output", "out", "--dtype", "int8"), "invalid choice: 'int8'"),
    (("--clip", "rendered:1", "--output", "out", "--least-confident", "100"), "from 0 to below"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE)
def test_wrong_usage(arguments: tuple[str, ...], message: str) -> None:
    answer = run("run", *arguments)
    assert answer.status == 2
    assert message in answer.err
    assert not Path("out").exists()


WRONG = [
    (("--clip", "nowhere.mp4"), "clip 'nowhere.mp4': there is no such file or folder"),
    (("--clip", "rendered:x"), "expected rendered:SEED"),
    (("--clip", "rendered:1", "--frames", "1"), "one frame alone has nothing to attend to"),
    (("--clip", "rendered:1", "--profile", "nope"), "no shipped profile is named 'nope'"),
    (
        ("--clip", "rendered:1", "--profile", "pi3", "--schedule", "x"),
        'the profile has no schedule "x"',
    ),
    (("--clip", "rendered:1", "--profile", "pi3"), "the profile does not fit the model"),
    (("--clip", "rendered:1", "--model", "nope:x/y"), "no model is called 'nope:x/y'"),
    (("--clip", "rendered:1", "--device", "cuda:99"), "cannot be moved to device 'cuda:99'"),
    (("--clip", "rendered:1", "--device", "toaster"), "cannot be moved to device 'toaster'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_cannot_be_run(arguments: tuple[str, ...], message: str, folder: Path) -> None:
    before = sorted(folder.iterdir())
    answer = run("run", *arguments, "--output", "out")
    assert answer.status == 1
    assert message in answer.err
    assert "Traceback" not in answer.err
    assert answer.out == ""
    assert sorted(folder.iterdir()) == before


def test_nothing_is_overwritten(folder: Path) -> None:
    Path("out").mkdir()
    for output, message in (
        ("out", "--output out exists already: choose another"),
        ("no/out", "there is no folder"),
    ):
        answer = run("run", "--clip", "rendered:7", "--frames", "2", "--output", output)
        assert answer.status == 1
        assert message in answer.err
    assert list(Path("out").iterdir()) == []


def test_running_out_of_memory_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("reference:random")
    clip = Clip("noise", torch.rand(3, 3, 16, 16))

    def exhausted(*args: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(model, "forward", exhausted)
    with pytest.raises(Spark3rError, match="out of memory at 2 frames: give fewer frames"):
        reconstruct(model, clip)


def test_a_precision_that_a_model_does_not_run_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("reference:random")
    clip = Clip("noise", torch.rand(3, 3, 16, 16))

    def unsupported(*args: object) -> None:
        raise RuntimeError("not implemented for 'BFloat16'\nat some place")

    monkeypatch.setattr(model, "forward", unsupported)
    with pytest.raises(Spark3rError, match=r"run in bfloat16 on cpu \(not .* 'BFloat16'\): use fl"):
        reconstruct(model, clip, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="not implemented"):
        reconstruct(model, clip)


def test_autocast_is_near_full_precision() -> None:
    model = load_model("reference")
    clip = Clip("noise", torch.rand(3, 3, 16, 16))
    full = reconstruct(model, clip).run.prediction
    low = reconstruct(model, clip, dtype=torch.bfloat16).run.prediction
    assert low.depth.dtype == torch.float32
    figures = deviation(low, full)
    assert 0 < figures.depth < 0.05
    assert deviation(full, full).to_dict() == {
        "depth": 0.0,
        "rotation_deg": pytest.approx(0.0, abs=1e-4),
        "translation_deg": pytest.approx(0.0, abs=1e-4),
        "points": pytest.approx(0.0, abs=1e-5),
        "scale_drift": pytest.approx(0.0, abs=1e-5),
    }


def make_cast() -> torch.nn.Module:
    return load_model("reference:random").bfloat16()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--model", "reference:random", "--dtype", "bfloat16"), "bfloat16"),
        (("--model", "test_run:make_cast"), "bfloat16"),
        (("--model", "test_run:make_cast", "--dtype", "bfloat16"), "bfloat16"),
    ],
)
def test_the_precision_that_the_pass_ran_in_is_recorded(
    options: tuple[str, ...], expected: str
) -> None:
    job = ("run", "--clip", "rendered:7", "--frames", "2", "--device", "cpu", "--output", "out")
    answer = run(*job, *options, "--json")
    assert answer.status == 0, answer.err
    assert answer.object["dtype"] == expected


def test_missing_pillow_is_reported_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("spark3r.cli.run.find_spec", lambda name: None)
    assert main(["run", "--clip", "rendered:7", "--output", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "pip install 'spark3r[video]'" in told
    assert "running" not in told
    assert not (tmp_path / "out").exists()
