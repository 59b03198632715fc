"""``spark3r run`` as users call it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from footage_files import frames_of, write_images, write_video
from PIL import Image
from profile_documents import reference_profile

from spark3r import Clip, Prediction, Profile, Spark3rError
from spark3r.cli.main import main
from spark3r.cli.run import ABOVE
from spark3r.families.reference import FAMILY as REFERENCE
from spark3r.identity import fingerprint
from spark3r.io.clips import load_clip
from spark3r.loading.load import load_model
from spark3r.loading.upstream import UPSTREAMS
from spark3r.profile import shipped_folder
from spark3r.reconstruction import deviation, reconstruct
from spark3r.reference.weights import SHIPPED_WEIGHTS
from spark3r.runner import Runner

FILES = [
    "cameras.json",
    "confidence",
    "depth",
    "points.ply",
    "preview",
    "quality.csv",
    "run.json",
    "scene.html",
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
        "model     reference (weights: Apache-2.0)\n"
        "schedule  dense\n"
        "clip      3 frames of 64x64 pixels from rendered:7\n"
        "device    cpu, float32\n"
        "dense     "
    )
    assert "written   out: depth/, confidence/, preview/" in answer.out
    assert answer.err.splitlines() == [
        "spark3r: loading the model",
        "spark3r: reading the clip",
        "spark3r: 3 frames of 64x64 pixels from rendered:7",
        "spark3r: warming up",
        "spark3r: dense pass",
        answer.err.splitlines()[5],
        "spark3r: writing",
    ]
    assert answer.err.splitlines()[5].startswith("spark3r: dense pass: done after ")
    clip = load_clip("rendered:7", "reference", frames=3).clip
    expected = Runner.of(load_model("reference")).predict(clip)
    depth = np.stack([np.load(f"out/depth/{i:05}.npy") for i in range(3)])
    assert np.array_equal(depth, expected.depth.numpy())


def test_a_video_reduced_and_compared(folder: Path, profile: str) -> None:
    write_video(folder / "tour.mp4", frames_of(3, 8))
    answer = run(
        *("run", "--model", "reference", "--clip", "tour.mp4", "--frames", "5"),
        *("--profile", profile, "--compare-dense", "--output", "out", "--json"),
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
    times = np.loadtxt("out/trajectory.txt")[:, 0]  # whose reader skips comments
    assert times == pytest.approx([0.0, 0.2, 0.4, 0.5, 0.7], abs=0.051)


def test_real_footage_asks_for_a_model(folder: Path) -> None:
    write_images(folder / "photos", frames_of(3, 4))
    answer = run("run", "--clip", "photos", "--output", "out")
    assert answer.status == 2
    first, *rest = answer.err.splitlines()
    assert first == (
        "spark3r: --clip photos is real footage, so say with --model which model is to see it:"
    )
    offered = [line.split()[1] for line in rest if line.startswith("  --model ")]
    assert offered == [
        *(f"{family}:{upstream.example}" for family, upstream in UPSTREAMS.items()),
        "reference",
    ]
    for upstream in UPSTREAMS.values():
        assert upstream.install in answer.err or upstream.installed
        assert upstream.example_licence in answer.err
    answer = run("run", "--clip", "photos", "--profile", "pi3", "--output", "out")
    assert answer.status == 2
    assert [line for line in answer.err.splitlines() if line.startswith("  --model ")] == [
        "  --model pi3:yyfz233/Pi3"
    ]
    assert [path.name for path in folder.iterdir()] == ["photos"]


def test_images_that_are_passed_over_are_said_and_recorded(folder: Path) -> None:
    write_images(folder / "photos", frames_of(3, 4))
    (folder / "photos" / "frame_9.heic").write_text("")
    answer = run("run", "--model", "reference", "--clip", "photos", "--output", "out", "--json")
    assert answer.status == 0, answer.err
    assert answer.object["passed_over"] == ["frame_9.heic: HEIC files are not read"]
    assert "spark3r: 1 that look like images were passed over: frame_9.heic: HEIC" in answer.err


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_names_that_are_no_text_are_said_and_written(folder: Path) -> None:
    photos = os.fsdecode(b"a\n\xff:%d")
    write_images(folder / photos, frames_of(3, 4), os.fsdecode(b"\xfe\n{}.png"))
    answer = run("run", "--model", "reference", "--clip", photos, "--output", "out")
    assert answer.status == 0, answer.err
    cameras = json.loads(Path("out/cameras.json").read_text())
    assert os.fsencode(cameras["frames"][3]["name"]) == b"\xfe\n3.png"


def test_the_reference_model_on_real_footage_says_what_it_is_for(folder: Path) -> None:
    write_images(folder / "photos", frames_of(3, 4))
    answer = run("run", "--model", "reference", "--clip", "photos", "--output", "out")
    assert answer.status == 0, answer.err
    assert answer.err.startswith("spark3r: the reference model is for trying spark3r: it sees")
    answer = run(
        "run", "--model", "reference", "--clip", "rendered:7", "--frames", "2", "--output=b"
    )
    assert answer.status == 0, answer.err
    assert "is for trying" not in answer.err


def evidence_of(mean: float) -> str:
    """Store a measured profile for the reference model, with this evidence of depth."""
    document = json.loads((shipped_folder() / "reference.json").read_text())
    document["schedules"][0]["length"]["min_frames"] = 2
    for entry in document["measurements"][0]["schedules"]:
        for figures in entry["figures"]:
            figures["deviation"] = {"depth_log": mean}
    Path("evidence.json").write_text(json.dumps(document))
    return "evidence.json"


def test_a_deviation_beyond_the_evidence_is_told_in_numbers(folder: Path) -> None:
    job = ("run", "--clip", "rendered:7", "--frames", "4", "--compare-dense")
    answer = run(*job, "--profile", evidence_of(1e-5), "--output", "out", "--json")
    assert answer.status == 0, answer.err
    record = answer.object
    depth = record["deviation"]["depth"]
    expected = record["expected"]
    assert expected["on"] == "16 rendered clips of 48 frames"
    assert expected["role"] == "held_out"
    assert expected["figures"]["depth"]["mean"] == pytest.approx(1e-5)
    (note,) = [note for note in record["notes"] if "deviates" in note]
    assert note.startswith(
        f"depth deviates {100 * depth:.3g}% from dense, {depth / 1e-5:.2g} times the 0.001% that "
        "the profile measured on 16 rendered clips of 48 frames; `calibrate --model reference "
        "--clip CLIP --budget 50%` measures a profile"
    )
    answer = run(*job, "--profile", evidence_of(depth), "--output", "quiet")
    assert answer.status == 0, answer.err
    assert "deviates" not in answer.err
    shown = f"{100 * depth:.3g}%"
    assert re.search(rf"^depth +{shown} +{shown} +{shown} +1\.0$", answer.out, re.MULTILINE), (
        answer.out
    )


def test_a_deviation_above_a_limit_has_its_own_exit_status(folder: Path, profile: str) -> None:
    job = ("run", "--clip", "rendered:7", "--frames", "4", "--profile", profile, "--compare-dense")
    answer = run(*job, "--fail-above", "0.001%", "--output", "out", "--json")
    assert answer.status == ABOVE == 4
    assert sorted(path.name for path in Path("out").iterdir()) == FILES
    assert "spark3r: --fail-above 0.001%: depth " in answer.err
    assert answer.object["above"][0].startswith("depth ")
    found = answer.object["deviation"]
    limits = {"rotation_deg": 1.0, "translation_deg": 4.0}
    highest = max(value / limits.get(name, 0.01) for name, value in found.items() if value)
    for share, status in ((1.001, 0), (0.999, ABOVE)):
        limit = f"{share * highest:.9f}%"
        answer = run(*job, "--fail-above", limit, "--output", f"out{share}")
        assert answer.status == status, answer.err


def test_passes_that_cannot_be_compared_are_kept() -> None:
    def behind(output: Any, images: torch.Tensor) -> Prediction:
        made = REFERENCE.predict(output, images) if REFERENCE.predict else None
        assert made is not None
        return replace(made, depth=-made.depth)

    model = load_model("reference:random")
    clip = Clip("noise", torch.rand(3, 3, 16, 16))
    made = reconstruct(
        model,
        clip,
        Profile.parse(json.dumps(reference_profile())),
        family=replace(REFERENCE, predict=behind),
        compare_dense=True,
    )
    assert made.deviation is None
    assert made.dense is not None
    assert any(note.startswith("the runs cannot be compared: ") for note in made.notes)


def test_every_file_says_what_it_was_made_from(folder: Path, profile: str) -> None:
    words = (
        "run",
        "--clip",
        "rendered:7",
        "--frames",
        "2",
        "--profile",
        profile,
        "--output",
        "π o",
    )
    answer = run(*words)
    assert answer.status == 0, answer.err
    record = json.loads(Path("π o/run.json").read_text())["provenance"]
    assert shlex.split(record["command"]) == ["spark3r", *words]
    assert record["weights"] == {
        "name": "reference",
        "file": "weights.safetensors",
        "sha256": hashlib.sha256(SHIPPED_WEIGHTS.read_bytes()).hexdigest(),
        "revision": None,
        "licence": "Apache-2.0",
        "attention": fingerprint(Runner.of(load_model("reference")).attention),
    }
    assert record["profile"] == {
        "name": profile,
        "sha256": hashlib.sha256(Path(profile).read_bytes()).hexdigest(),
        "schedule": "fast",
    }
    assert json.loads(Path("π o/cameras.json").read_text())["provenance"] == record
    line = f'weights.sha256 "{record["weights"]["sha256"]}"'
    header = Path("π o/points.ply").read_bytes().partition(b"end_header")[0].decode("ascii")
    assert f"comment {line}\n" in header
    assert f"comment command {json.dumps(record['command'])}\n" in header
    assert f"# {line}\n" in Path("π o/trajectory.txt").read_text()
    with Image.open("π o/preview/00000.png") as preview:
        assert line in preview.info["Comment"]


def test_random_weights_have_no_file(folder: Path) -> None:
    job = ("run", "--model", "reference:random", "--clip", "rendered:7", "--frames", "2")
    record = run(*job, "--output", "out", "--json").object["provenance"]
    assert record["weights"]["sha256"] is None
    assert record["weights"]["attention"]
    assert record["code"] is record["profile"] is None


def test_stages_are_logged_as_they_end(folder: Path, profile: str) -> None:
    job = ("run", "--clip", "rendered:7", "--frames", "2", "--log-json", "log.jsonl")
    assert run(*job, "--profile", profile, "--compare-dense", "--output", "out").status == 0
    stages = ["load", "read", "warm-up", "dense", "reduced", "compare", "write", "run"]
    lines = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == stages
    assert all(line["seconds"] >= 0 and line["error"] is None for line in lines)
    assert lines[-1]["seconds"] >= sum(line["seconds"] for line in lines[:-1])
    assert lines[-1]["peak_memory_gb"] == max(line["peak_memory_gb"] for line in lines[:-1])
    answer = run(*job, "--output", "out")  # which exists
    assert answer.status == 1
    answer = run(*job, "--model", "nope:x/y", "--output", "b")
    assert answer.status == 1
    lines = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()][8:]
    assert [(line["stage"], bool(line["error"])) for line in lines] == [
        ("run", True),
        ("load", True),
        ("run", True),
    ]
    assert lines[1]["error"] in answer.err


def test_a_log_that_cannot_be_written_is_refused_at_once(folder: Path) -> None:
    job = ("run", "--clip", "rendered:7", "--output", "out", "--log-json")
    for path, why in ((".", "Is a directory"), ("no/log.jsonl", "No such file or directory")):
        answer = run(*job, path)
        assert answer.status == 1
        assert answer.err == f"spark3r: --log-json {path} cannot be written ({why})\n"


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
    assert answer.err.splitlines()[0] == "spark3r: loading the model"
    assert message in answer.err.splitlines()[1]
    assert answer.err.count("\n") == 2
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
    assert re.search(r"^depth +0%$", answer.out, re.MULTILINE)


def test_frames_that_cannot_be_read_are_counted(folder: Path) -> None:
    write_images(folder / "photos", frames_of(3, 4))
    (folder / "photos" / "frame_2.png").write_text("no picture")
    job = ("run", "--model", "reference", "--clip", "photos", "--output", "out")
    answer = run(*job)
    assert answer.status == 1
    assert "frame_2.png cannot be read (not an image)" in answer.err
    answer = run(*job, "--skip-bad", "--json")
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
    assert answer.out.startswith("model     reference:random (random weights)\n")
    record = json.loads(Path("out/run.json").read_text())
    assert (record["weights"], record["random_weights"]) == ("random", True)
    assert 1 <= record["points"] <= 10


USAGE = [
    (("--output", "out"), "the following arguments are required: --clip"),
    (("--clip", "rendered:1"), "the following arguments are required: --output"),
    (
        ("--clip", "rendered:1", "--output", "out", "--start", "-1"),
        "expected seconds such as 12.5",
    ),
    (
        ("--clip", "rendered:1", "--output", "out", "--every", "0"),
        "expected an integer of at least",
    ),
    (
        ("--clip", "rendered:1", "--output", "out", "--compare-dense"),
        "--compare-dense needs --profile",
    ),
    (("--clip", "rendered:1", "--output", "out", "--schedule", "a"), "--schedule needs --profile"),
    *(
        (("--clip", "rendered:1", "--output", "out", option, ""), f"{option}: '' is empty")
        for option in ("--model", "--clip", "--output", "--profile", "--schedule", "--device")
    ),
    (("--clip", "rendered:1", "--output", "out", "--log-json", " "), "--log-json: ' ' is empty"),
    (
        ("--clip", "rendered:1", "--output", "out", "--profile", "p", "--fail-above", "2%"),
        "--fail-above needs --compare-dense",
    ),
    (("--clip", "rendered:1", "--output", "out", "--fail-above", "two"), "'two', expected a perc"),
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
    (("--clip", "rendered:1", "--device", "cuda:99"), "device 'cuda:99' cannot be used: "),
    (("--clip", "rendered:1", "--device", "toaster"), "device 'toaster' cannot be used: "),
    (("--clip", "rendered:1", "--device", "meta"), "device 'meta' computes nothing"),
    (("--clip", f"rendered:{10**20}"), "with at most 15 digits"),
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
