"""The deviation that a profile measured, against its document read by hand."""

from __future__ import annotations

import json
import statistics

import pytest
from profile_documents import copied, measured, paper

from spark3r.profile import Profile, load_profile, shipped_folder
from spark3r.profile.expectation import ExpectedFigure, expected_deviation


@pytest.mark.parametrize(("schedule", "role"), [(None, "held_out"), ("3.16x", "validation")])
def test_the_shipped_profile(schedule: str | None, role: str) -> None:
    document = json.loads((shipped_folder() / "reference.json").read_text(encoding="utf-8"))
    (measurement,) = document["measurements"]
    roles = {clip["name"]: clip["role"] for clip in measurement["clips"]}
    name = schedule or document["default"]
    (run,) = [run for run in measurement["schedules"] if run["schedule"] == name]
    expected = expected_deviation(load_profile("reference"), schedule)
    assert expected is not None
    assert expected.role == role
    for ours, theirs in (("depth", "depth_log"), ("rotation_deg", "rotation_deg")):
        values = [
            figures["deviation"][theirs]
            for figures in run["figures"]
            if roles[figures["clip"]] == role
        ]
        assert expected.figures[ours].mean == pytest.approx(statistics.fmean(values))
        assert expected.figures[ours].largest == max(values)
    assert str(expected) == f"{len(values)} rendered clips of 48 frames"


def test_without_evidence_nothing_is_expected() -> None:
    assert expected_deviation(Profile.parse(json.dumps(paper()))) is None
    document = measured()
    for run in document["measurements"][0]["schedules"]:
        for figures in run["figures"]:
            figures["deviation"] = None
    assert expected_deviation(Profile.parse(json.dumps(document))) is None


def test_the_measurement_nearest_to_the_run_is_taken() -> None:
    document = measured()
    first = document["measurements"][0]
    for grid, dtype, depth in (([4, 4], "float32", 0.25), ([4, 4], "bfloat16", 0.5)):
        other = copied(first)
        other["grid"], other["dtype"] = grid, dtype
        for run in other["schedules"]:
            for figures in run["figures"]:
                figures["deviation"] = {"depth_log": depth}
        document["measurements"].append(other)
    profile = Profile.parse(json.dumps(document))

    def depth_on(grid: tuple[int, int], dtype: str) -> float:
        expected = expected_deviation(profile, grid=grid, dtype=dtype)
        assert expected is not None
        return expected.figures["depth"].mean

    assert depth_on((4, 4), "float32") == 0.25
    assert depth_on((4, 4), "bfloat16") == 0.5
    assert depth_on((9, 9), "bfloat16") == 0.5


def test_clips_that_nothing_saw_count_before_those_of_the_search() -> None:
    document = measured()
    (measurement,) = document["measurements"]
    (clip,) = measurement["clips"]
    measurement["clips"] = [
        clip | {"name": role, "role": role, "frames": frames}
        for role, frames in (("search", 8), ("held_out", 16), ("validation", 4))
    ]
    for run in (measurement["dense"], *measurement["schedules"], *measurement["baselines"]):
        run["figures"] = []
    measurement["schedules"][0]["figures"] = [
        {"clip": role, "deviation": {"depth_log": depth}}
        for role, depth in (("search", 0.1), ("held_out", 0.2), ("validation", 0.3))
    ]
    document["sensitivity"] = []
    expected = expected_deviation(Profile.parse(json.dumps(document)))
    assert expected is not None
    assert (expected.role, expected.clips) == ("held_out", ("held_out",))
    assert expected.figures == {"depth": ExpectedFigure(0.2, 0.2)}
    assert str(expected) == "1 clip of 16 frames"


@pytest.mark.parametrize(("value", "exceeded"), [(0.01, False), (0.044, False), (0.046, True)])
def test_beyond_is_well_above_the_largest(value: float, exceeded: bool) -> None:
    assert ExpectedFigure(mean=0.01, largest=0.03).is_exceeded(value) == exceeded
