"""Figures of single frames and the suspects that they make, on exact geometry."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from spark3r import Clip
from spark3r.metrics import FrameFigures, frame_figures, suspects
from spark3r.metrics.consistency import consistency_metrics
from spark3r.reference.scenes.render import rendered_clip

FRAMES = 24


@cache
def exact(seed: int = 2_000_300) -> Clip:
    return rendered_clip(seed, FRAMES, 48, 48)


def figures_of(clip: Clip, **options: int) -> FrameFigures:
    assert clip.depth is not None
    assert clip.intrinsics is not None
    assert clip.extrinsics is not None
    return frame_figures(clip.images, clip.depth, clip.intrinsics, clip.extrinsics, **options)


def suspected(clip: Clip) -> dict[int, tuple[str, ...]]:
    return {n: words for n, words in enumerate(suspects(figures_of(clip))) if words}


def with_frame(values: Tensor | None, frame: int, value: Tensor) -> Tensor:
    assert values is not None
    values = values.clone()
    values[frame] = value
    return values


def test_exact_geometry_is_not_suspected() -> None:
    for seed in range(2_000_300, 2_000_304):
        assert suspected(exact(seed)) == {}


def test_a_camera_that_is_elsewhere_jumps_and_disagrees() -> None:
    clip = exact()
    assert clip.extrinsics is not None
    moved = clip.extrinsics[11].clone()
    moved[:, 3] += torch.tensor([0.4, -0.3, 0.5])
    found = suspected(replace(clip, extrinsics=with_frame(clip.extrinsics, 11, moved)))
    assert {"jumps", "disagrees"} <= set(found.pop(11))
    assert set(found) <= {12}  # the joint with it


def test_depth_of_another_scale_disagrees_and_flat_depth_is_flat() -> None:
    clip = exact()
    assert clip.depth is not None
    found = suspected(replace(clip, depth=with_frame(clip.depth, 5, 1.5 * clip.depth[5])))
    assert list(found) == [5]
    assert found[5] == ("disagrees",)
    found = suspected(replace(clip, depth=with_frame(clip.depth, 5, torch.full((48, 48), 2.0))))
    assert "flat" in found[5]


def test_blurred_and_featureless_frames_are_told_apart() -> None:
    clip = exact()
    blurred = torch.nn.functional.avg_pool2d(clip.images[8:9], 9, 1, 4)[0]
    assert suspected(replace(clip, images=with_frame(clip.images, 8, blurred))) == {8: ("blurred",)}
    wall = 0.5 + 0.01 * torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert suspected(replace(clip, images=with_frame(clip.images, 8, wall))) == {
        8: ("featureless",)
    }


def test_a_cut_is_found_where_the_other_scene_begins() -> None:
    first, second = exact(), exact(2_000_301)
    both = {
        name: torch.cat([getattr(first, name)[:12], getattr(second, name)[:12]])
        for name in ("images", "depth", "intrinsics", "extrinsics")
    }
    assert "cut" in suspected(replace(first, **both))[12]


def test_disagreement_of_two_frames_is_their_consistency() -> None:
    clip = exact()
    assert clip.depth is not None
    assert clip.intrinsics is not None
    assert clip.extrinsics is not None
    every = (clip.images, 1.1 * clip.depth, clip.intrinsics, clip.extrinsics)
    two = [values[[3, 4]] for values in every]
    figures = frame_figures(two[0], two[1], two[2], two[3])
    whole = consistency_metrics(two[1], two[2], two[3], key_frames=2)
    assert figures.joint[1].item() == pytest.approx(whole.log_ratio)
    assert figures.disagreement.tolist() == pytest.approx([whole.log_ratio] * 2)
    assert math.isnan(figures.joint[0])
    assert suspects(figures) == [(), ()]


def test_figures_do_not_depend_on_how_many_frames_are_at_once() -> None:
    whole, pieces = figures_of(exact()), figures_of(exact(), at_once=5)
    for name in FrameFigures.__dataclass_fields__:
        torch.testing.assert_close(
            getattr(pieces, name), getattr(whole, name), equal_nan=True, rtol=1e-6, atol=1e-9
        )


def test_depth_that_is_not_known_is_left_out() -> None:
    clip = exact()
    assert clip.depth is not None
    holes = clip.depth.clone()
    holes[:, :10] = math.inf
    holes[3] = math.nan
    figures = figures_of(replace(clip, depth=holes))
    assert figures.disagreement[4:].isfinite().all()
    assert math.isnan(figures.disagreement[3])
    assert set(n for n, words in enumerate(suspects(figures)) if words) <= {3}


def test_one_frame_has_nothing_to_be_compared_with() -> None:
    clip = exact()
    assert clip.depth is not None
    assert clip.intrinsics is not None
    assert clip.extrinsics is not None
    one = frame_figures(clip.images[:1], clip.depth[:1], clip.intrinsics[:1], clip.extrinsics[:1])
    assert suspects(one) == [()]
