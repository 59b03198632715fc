"""The generic family on a model that has a family of its own, to compare with."""

from __future__ import annotations

import pytest
import torch
from patched import FAITHFUL, REDUCED, depth
from small_models import make_images
from torch import nn

import spark3r
from spark3r import FamilyError, LayoutError, Schedule
from spark3r.families import generic
from spark3r.layout import TokenLayout


def generic_reference(**changes):
    options = {"entry": "aggregator", "patch_size": 8, "special": 5, "anchor_frame": 0}
    options["patches_overlap"] = True
    return generic("aggregator.global_blocks.*.attn", **(options | changes))


@pytest.mark.parametrize("schedule", [REDUCED, FAITHFUL])
def test_generic_agrees_with_the_family_written_for_the_model(model, schedule):
    images = make_images(7)
    with spark3r.apply(model, schedule):
        expected = depth(model, images)
    with spark3r.apply(model, schedule, family=generic_reference()):
        torch.testing.assert_close(depth(model, images), expected, rtol=1e-4, atol=1e-5)

    def layout(images):
        batch, frames, _, height, width = images.shape
        return batch, TokenLayout(frames, height // 8, width // 8, special=5, anchor_frame=0)

    by_function = generic_reference(patch_size=None, special=0, anchor_frame=None, layout=layout)
    with spark3r.apply(model, schedule, family=by_function):
        torch.testing.assert_close(depth(model, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "attention",
    [
        ["aggregator.global_blocks.1.attn", "aggregator.global_blocks.[0]*attn"],
        lambda name: "global" in name and name.endswith(".attn"),
    ],
    ids=["patterns", "function"],
)
def test_layers_by_several_patterns_or_a_function(model, attention):
    options = {"entry": "aggregator", "patch_size": 8, "special": 5, "patches_overlap": True}
    images = make_images(5)
    with spark3r.apply(model, REDUCED, family=generic_reference()):
        expected = depth(model, images)
    family = generic(attention, anchor_frame=0, **options)
    with spark3r.apply(model, REDUCED, family=family) as handle:
        assert handle.layers == tuple(f"aggregator.global_blocks.{i}.attn" for i in range(2))
        assert torch.equal(depth(model, images), expected)
    with pytest.raises(FamilyError, match="matches nowhere"):
        spark3r.apply(model, REDUCED, family=generic(nowhere, **options))


def nowhere(name):
    return False


def test_generic_mistakes_are_named(model):
    images = make_images(4)
    with pytest.raises(FamilyError, match="no module of ReferenceModel matches 'blocks"):
        spark3r.apply(model, REDUCED, family=generic("blocks.*", patch_size=8))
    with pytest.raises(FamilyError, match="has no module 'encoder'"):
        spark3r.apply(model, REDUCED, family=generic_reference(entry="encoder"))
    with pytest.raises(FamilyError, match="needs either patch_size="):
        generic("blocks.*")
    assert not spark3r.is_applied(model)
    with (
        spark3r.apply(model, REDUCED, family=generic_reference(special=4)),
        pytest.raises(
            LayoutError, match=r"given 44 tokens \(batch 1\) in a pass of 40 .* token counts do not"
        ),
    ):
        depth(model, images)
    with (
        spark3r.apply(
            model,
            REDUCED,
            family=generic(
                "aggregator.global_blocks.*.mlp", entry="aggregator", patch_size=8, special=5
            ),
        ),
        pytest.raises(FamilyError, match="Mlp called scaled_dot_product_attention 0 times"),
    ):
        depth(model, images)


def test_unknown_model_is_told_how_to_use_generic():
    with pytest.raises(FamilyError, match=r"Linear is of no family .*generic\("):
        spark3r.apply(nn.Linear(2, 2), Schedule.dense(2))
