from __future__ import annotations

import pytest
import tiny_job
import torch

from calibrate.clips import split_clips
from spark3r import Clip, ClipError


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
