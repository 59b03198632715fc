from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_job
import torch

from calibrate.clips import split_clips
from calibrate.defaults import MOST_HELD_OUT
from spark3r import Clip, ClipError, Profile
from spark3r.profile import profile_path


@pytest.fixture(scope="module")
def clips() -> list:
    return tiny_job.clips(6)


def test_roles_do_not_overlap(clips: list) -> None:
    split = split_clips(clips)
    assert [len(split.search), len(split.validation), len(split.held_out)] == [4, 1, 1]
    split = split_clips(clips[:4], clips[4:])
    assert [len(split.search), len(split.validation), len(split.held_out)] == [3, 1, 2]
    long = Clip("long", torch.rand(9, 3, 16, 16))
    cut = split_clips([long])
    parts = [*cut.search, *cut.validation, *cut.held_out]
    assert torch.equal(torch.cat([part.images for part in parts]), long.images)
    assert len({part.name for part in parts}) == 4


def test_clips_that_cannot_be_split_are_refused(clips: list) -> None:
    with pytest.raises(ClipError, match="has 1 frames, expected at least 8"):
        split_clips([clips[0].select(slice(0, 1))])
    with pytest.raises(ClipError, match="has 1 frame"):
        split_clips([*clips[:4], clips[4].select(slice(0, 1))])
    with pytest.raises(ClipError, match="has 1 frame"):
        split_clips(clips[:4], [clips[4].select(slice(0, 1))])
    with pytest.raises(ClipError, match="different names"):
        split_clips([clips[0], clips[0]])
    with pytest.raises(ClipError, match="no clip"):
        split_clips([])


def test_a_profile_holds_the_figures_of_the_most_clips_and_more_are_refused(
    clips: list, tmp_path: Path
) -> None:
    document = json.loads(profile_path("reference").read_text())
    (measurement,) = document["measurements"]
    runs = [measurement["dense"], *measurement["schedules"], *measurement["baselines"]]
    of_clip = {each["name"]: each for each in measurement["clips"]}
    held_out = [name for name, each in of_clip.items() if each["role"] == "held_out"]
    more = [f"rendered:v2:{number}" for number in range(4 * MOST_HELD_OUT)]
    for run in runs:
        reported = [each for each in run["figures"] if each["clip"] in held_out]
        for name in more[: MOST_HELD_OUT - len(held_out) if reported else 0]:
            run["figures"].append({**reported[0], "clip": name})
    model = of_clip[held_out[0]]
    measurement["clips"] += [
        {**model, "name": name, "digest": f"{number:016x}"} for number, name in enumerate(more)
    ]
    path = tmp_path / "large.json"
    path.write_text(json.dumps(document))
    profile = Profile.load(path)
    profile.save(tmp_path / "again.json")
    assert Profile.load(tmp_path / "again.json") == profile

    few = clips[0].select(slice(0, 2))
    many = [Clip(str(n), few.images) for n in range(MOST_HELD_OUT + 1)]
    assert len(split_clips(clips, many[1:]).held_out) == MOST_HELD_OUT
    with pytest.raises(ClipError, match="201 clips would be held out"):
        split_clips(clips, many)
