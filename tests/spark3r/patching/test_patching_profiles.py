"""A schedule or profile while it is applied: fit, warnings, printing."""

from __future__ import annotations

import warnings

import pytest
import torch
from patched import FAITHFUL, REDUCED, depth
from small_models import make_images

import spark3r
from spark3r import (
    LayerRule,
    LengthRule,
    PatchError,
    Profile,
    ProfileError,
    Schedule,
    Spark3rWarning,
)
from spark3r.families.registry import detect
from spark3r.identity import describe
from spark3r.patching.handle import Handle
from spark3r.runner import Runner


def profile_of(model, **changes):
    family = detect(model)
    record = describe(family.name, family.attention(model), family.metadata(model))
    options = {"status": "prior", "source": "these tests", "notes": "made up"} | changes
    return Profile.create(record, {"fast": REDUCED, "faithful": FAITHFUL}, **options)


def test_profiles_are_applied_by_object_path_and_schedule_name(model, tmp_path):
    images = make_images(9)
    profile = profile_of(model)
    profile.save(tmp_path / "mine.json")
    for schedule, name in ((REDUCED, None), (FAITHFUL, "faithful")):
        with spark3r.apply(model, schedule):
            expected = depth(model, images)
        for source in (profile, tmp_path / "mine.json", str(tmp_path / "mine.json")):
            with pytest.warns(Spark3rWarning, match="was not measured on your weights"):
                handle = spark3r.apply(model, source, schedule=name)
            with handle:
                assert torch.equal(depth(model, images), expected)
                assert handle.schedule == schedule


def test_profiles_that_do_not_fit_are_refused(model, tmp_path):
    with pytest.raises(ProfileError, match="vggt-1b"):
        spark3r.apply(model, "vgt-1b")
    with pytest.raises(PatchError, match="for family 'vggt', the model's is 'reference'"):
        spark3r.apply(model, "vggt-1b")
    names = tuple(f"aggregator.global_blocks.{i}.attn" for i in range(3))
    larger = profile_of(model).model.model_copy(update={"global_layers": names})
    larger_profile = Profile.create(
        larger, {"dense": Schedule.dense(3)}, status="prior", source="here", notes="none"
    )
    with pytest.raises(PatchError, match=r"for 3 global layers .*, the model has 2"):
        spark3r.apply(model, larger_profile)
    with pytest.raises(ProfileError, match='no schedule "slow", expected one of: fast'):
        spark3r.apply(model, profile_of(model), schedule="slow")
    with pytest.raises(PatchError, match="was not measured on your weights"):
        spark3r.apply(model, profile_of(model), strict=True)
    with pytest.raises(PatchError, match="names one of a profile's schedules"):
        spark3r.apply(model, REDUCED, schedule="fast")
    assert not spark3r.is_applied(model)


def test_clamped_factors_and_long_clips_warn_once(model):
    spark3r.apply(model, Schedule((LayerRule(1, 50), LayerRule()), length=LengthRule(max_frames=4)))
    with pytest.warns(Spark3rWarning, match="larger than a clip of 3 frames of 3x2 patches"):
        depth(model, make_images(3))
    with pytest.warns(Spark3rWarning, match="longer than the 4 that the schedule"):
        depth(model, make_images(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depth(model, make_images(3))
        depth(model, make_images(2))
        depth(model, make_images(6))


def test_a_grid_without_evidence_warns_once(model):
    Handle(Runner.of(model), REDUCED, frozenset({(3, 2)})).install()
    depth(model, make_images(6, 24, 16))
    with pytest.warns(Spark3rWarning, match="not measured on frames of 2x2 patches"):
        depth(model, make_images(6, 16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depth(model, make_images(7, 32, 16))
    spark3r.remove(model)


def test_short_clips_run_dense(model):
    images = make_images(4)
    dense = depth(model, images)
    schedule = Schedule.uniform(2, 4, 2, length=LengthRule(min_frames=5))
    spark3r.apply(model, schedule)
    assert torch.equal(depth(model, images), dense)


def test_printing_a_handle_shows_its_layers(model):
    handle = spark3r.apply(model, REDUCED)
    text = str(handle)
    assert "family reference, 2 global layers" in text
    assert "aggregator.global_blocks.1.attn      2          3" in text
    assert "operators: temporal stride; queries merged in groups of 4, copied back" in text
    faithful = str(spark3r.apply(model, FAITHFUL))
    assert "token stride + anchor, β 1; queries merged, linear unmerging" in faithful
    handle.remove()
    assert "(removed)" in str(handle)
