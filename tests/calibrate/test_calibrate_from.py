"""`calibrate --from`: another budget with the measurements of a profile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_job
from tiny_job import JOB, FixedTimer, Notes, main

from spark3r import Profile
from spark3r.timing import Latency, Treatment


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny_job.place(monkeypatch, tmp_path)


@pytest.fixture
def measured(tmp_path: Path) -> dict[str, Any]:
    """The document of a.json, a profile of the tiny model in the test's folder."""
    text = tiny_job.profile_text()
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def test_a_profile_that_cannot_be_read_is_refused_before_clips_are_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text("hi")
    job, notes = ["--budget", "75%", *JOB, "--from", "bad.json", "--output", "a.json"], Notes()
    assert main(job, reporter=notes) == 1
    assert "bad.json: not JSON" in capsys.readouterr().err
    assert not notes.steps


@pytest.mark.usefixtures("measured")
def test_from_a_profile_only_the_answer_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    again = ["--budget", "60%", *JOB, "--from", "a.json", "--output", "b.json", "--json"]
    notes = Notes()
    assert main(again, reporter=notes) == 0
    assert set(notes.steps) == {"reading", "dense, held out", "verification"}
    document = json.loads(capsys.readouterr().out)
    row = next(row for row in document["schedules"] if row["exported"])
    assert row["predicted_ms"] <= 60
    assert row["measured_ms"] == pytest.approx(row["predicted_ms"])
    predicted = f"knapsack: predicted {row['predicted_ms']:.1f} ms, measured"
    assert any(line.startswith(predicted) for line in notes.lines)
    first, second = Profile.load(tmp_path / "a.json"), Profile.load(tmp_path / "b.json")
    assert second.sensitivity == first.sensitivity
    models = [profile.measurements[0].latency_model.constants for profile in (first, second)]
    assert models[1] == pytest.approx(models[0])
    assert "solved by the sensitivities and the latency model of a.json" in second.notes

    assert {*document["report"]} == {"b-sensitivity.png", "b-schedules.png", "b.html"}
    assert document["from"].endswith("a.json")
    page = (tmp_path / "b.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert "those of a.json" in page


class BusyWall(FixedTimer):
    """A busy machine on which the wall alone takes longer than the profile's model says."""

    def time_in_turns(
        self, treatments: Sequence[Treatment], **options: object
    ) -> dict[str, Latency]:
        timed = super().time_in_turns(treatments, **options)
        what = {each.name: getattr(each.subject, "what", None) for each in treatments}
        return {
            name: replace(each.scaled(1.4 if what[name] == "wall" else 1.0), busy=2.0)
            for name, each in timed.items()
        }


@pytest.mark.usefixtures("measured")
def test_a_wall_that_was_predicted_wrongly_is_no_change_of_pace() -> None:
    again = ["--budget", "60%", *JOB, "--from", "a.json", "--output", "b.json"]
    notes = Notes()
    assert main(again, BusyWall(), reporter=notes) == 0
    assert any("CPU time per thread is taken" in line for line in notes.lines)
    assert not any(
        "times as long as when the latency model was fitted" in line for line in notes.lines
    )


def test_from_a_profile_the_measurement_of_this_device_is_taken(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job = [*JOB, "--objective", "depth", "--quiet"]
    assert main(["--budget", "75%", *job, "--output", "a.json"]) == 0
    document = json.loads((tmp_path / "a.json").read_text())
    (here,) = document["measurements"]
    other = json.loads(json.dumps(here)) | {"device": "another GPU"}
    other["latency_model"]["constants"]["rest_ms"] *= 1000
    document["measurements"] = [other, here]
    (tmp_path / "both.json").write_text(json.dumps(document))
    again = ["--budget", "60%", *job, "--from", "both.json", "--output", "b.json"]
    assert main(again) == 0
    (measurement,) = Profile.load(tmp_path / "b.json").measurements
    assert measurement.latency_model.constants == pytest.approx(here["latency_model"]["constants"])
    # Clips of the other roles were not run, and are not among the evidence.
    assert {clip.role for clip in measurement.clips} == {"held_out"}


def test_clips_are_by_default_as_long_as_the_profile_holds_for(
    measured: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("calibrate.cli.clips.FROM_HELD_OUT_CLIPS", 2)
    for schedule in measured["schedules"]:
        schedule["length"]["min_frames"] = 26
    (tmp_path / "long.json").write_text(json.dumps(measured))
    bare = ["--size", "16", "--model", "tiny_job:make_tiny", "--from", "long.json", "--json"]
    assert main(["--budget", "60%", *bare, "--output", "b.json"]) == 0
    (measurement,) = Profile.load(tmp_path / "b.json").measurements
    assert [clip.frames for clip in measurement.clips] == [26, 26]
    assert "rendering: 2 of 2" in capsys.readouterr().err  # nothing to search on


def test_shipped_profiles_are_found_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    goal = ["--budget", "75%", *JOB, "--output", "b.json", "--quiet"]
    assert main([*goal, "--from", "vggt-1b"]) == 1
    assert "vggt-1b.json: has no measurements to solve from" in capsys.readouterr().err
    assert main([*goal, "--from", "vggt-1"]) == 1
    assert "did you mean vggt-1b" in capsys.readouterr().err


def test_neither_dense_nor_the_wall_is_timed_again(
    measured: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job = ["--budget", "500%", *JOB, "--from", "a.json", "--output", "b.json"]
    twice = FixedTimer(pace=2.0)  # the machine takes twice as long as when the profile was made
    assert main([*job, "--json", "--quiet"], twice) == 0
    document = json.loads(capsys.readouterr().out)
    ms = {row["schedule"]: row["measured_ms"] for row in document["schedules"]}
    expected = {"dense": 2 * tiny_job.DENSE_MS, "wall": 2 * tiny_job.WALL_MS}
    assert ms == pytest.approx(expected)
    assert document["dense_timed"] is True
    (measurement,) = measured["measurements"]
    measurement["wall"]["median_ms"] *= 1.2  # a profile of an earlier version, of two paces
    measurement["dense"]["latency"]["median_ms"] *= 1.2
    (tmp_path / "old.json").write_text(json.dumps(measured))
    job = ["--budget", "500%", *JOB, "--from", "old.json", "--output", "c.json"]
    assert main([*job, "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    ms = {row["schedule"]: row["measured_ms"] for row in document["schedules"]}
    assert ms["dense"] is None  # predicted
    assert ms["wall"] == pytest.approx(tiny_job.WALL_MS)


@pytest.mark.usefixtures("measured")
def test_dense_at_another_length_is_not_reported_as_too_large_for_memory(tmp_path: Path) -> None:
    job = ["--budget", "75%", *JOB, "--from", "a.json", "--output", "b.json", "--quiet"]
    assert main([*job, "--target-frames", "32"]) == 0
    assert "does not fit" not in Profile.load(tmp_path / "b.json").notes


@pytest.mark.usefixtures("measured")
def test_dense_has_figures_on_all_clips_of_a_profile(tmp_path: Path) -> None:
    measurement = Profile.load(tmp_path / "a.json").measurements[0]
    dense = {figures.clip for figures in measurement.dense.figures}
    roles = {clip.name: clip.role for clip in measurement.clips}
    assert {roles[clip] for clip in dense} == {"validation", "held_out"}
    for run in (*measurement.schedules, *measurement.baselines):
        assert {figures.clip for figures in run.figures} <= dense
        assert all(each.error and each.consistency and each.deviation for each in run.figures)


def test_a_profile_of_another_model_is_refused_before_clips_are_made(
    measured: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for each in measured["measurements"]:
        each["device"] = "another GPU"
    Path("b.json").write_text(json.dumps(measured))
    notes = Notes()
    job = ["--budget", "60%", *JOB, "--from", "b.json", "--output", "c.json"]
    assert main(job, reporter=notes) == 1
    assert "measured on another GPU" in capsys.readouterr().err
    assert not notes.steps


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"sensitivity": []}, [], "has no sensitivities to solve from"),
        ({}, ["--dtype", "bfloat16"], "the model runs in bfloat16"),
        ({}, ["--model", "reference"], "the profile is for 2 global layers"),
        ({}, ["--budget", "10x"], "cannot be reached"),
        ({}, ["--objective", "depth"], "has no sensitivities of --objective depth"),
        ({}, ["--frames", "3"], "holds for clips of at least 4 frames, and a held-out one has 3"),
    ],
)
def test_profiles_that_do_not_fit_are_refused(
    changes: dict,
    arguments: list[str],
    message: str,
    measured: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("b.json").write_text(json.dumps(measured | changes))
    job = ["--budget", "60%", *JOB, "--from", "b.json", "--output", "c.json", "--quiet"]
    assert main([*job, *arguments]) in (1, 3)
    assert message in capsys.readouterr().err
    assert not Path("c.json").exists()
