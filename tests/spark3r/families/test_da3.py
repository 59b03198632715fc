"""Depth-Anything-3's reference view, given cameras, and the objects that hold the network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import stand_ins
import torch
import upstream_models as upstream
from family_cases import (
    CASES,
    DA3_PACKAGES,
    Case,
    build,
    difference,
    images,
    missing,
    reducing,
    run,
)
from torch import Tensor, nn

import spark3r
from spark3r import Schedule, TokenLayout
from spark3r.families.base import Family
from spark3r.families.registry import detect

DA3 = [case for case in CASES if case.family == "da3"]


@pytest.fixture(params=DA3, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def test_reference_view_moves_to_the_first_slot(case: Case) -> None:
    """A reduced run that reorders equals one whose frames were reordered by hand."""
    model, clip = build(case), images(case, 7)
    order = [3, 0, 1, 2, 4, 5, 6]
    with spark3r.apply(model, reducing(case.layers)):
        middle = run(model, clip, ref_view_strategy="middle")
        by_hand = run(model, clip[:, order], ref_view_strategy="first")
    back = torch.tensor(order).argsort()
    expected = {name: value[:, back] for name, value in by_hand.items()}
    assert torch.equal(middle["depth"], expected["depth"])
    # Upstream inverts all poses at once, which rounds by a frame's place, dense as well.
    assert difference(middle, expected) < 1e-6


@pytest.mark.parametrize("case", [case for case in DA3 if case.needs], ids=str)
def test_every_strategy_runs_reduced(case: Case) -> None:
    model, clip = build(case), images(case, 7, batch=2)
    with spark3r.apply(model, reducing(case.layers)):
        for strategy in ("saddle_balanced", "saddle_sim_range"):
            output = run(model, clip, ref_view_strategy=strategy)
            assert all(bool(torch.isfinite(value).all()) for value in output.values())


def test_given_cameras_leave_no_anchor_frame(case: Case) -> None:
    model, clip = build(case), images(case, 4)
    family, seen = _noting_layouts(model)
    with spark3r.apply(model, reducing(case.layers), family=family, guard=False):
        run(model, clip)
        cameras: dict[str, Tensor] = {"extrinsics": torch.eye(4).repeat(1, 4, 1, 1)}
        if case.needs:
            cameras["intrinsics"] = torch.eye(3).repeat(1, 4, 1, 1)
        output = run(model, clip, **cameras)
    assert [layout.anchor_frame for layout in seen] == [0, None]
    assert bool(torch.isfinite(output["depth"]).all())


def test_api_object_and_nested_network() -> None:
    clip = images(DA3[0], 6)
    api = stand_ins.Da3Api().eval()
    nested = nn.Module()
    nested.da3, nested.da3_metric = stand_ins.Da3(), stand_ins.Da3(alt_start=-1)
    assert next(iter(detect(nested).attention(nested))).startswith("da3.backbone.pretrained.")
    with torch.no_grad():
        dense = api.inference(clip)
        with spark3r.apply(api, reducing(3)) as handle:
            assert handle.layers[0] == "model.backbone.pretrained.blocks.3.attn"
            assert difference(api.inference(clip), dense) > 1e-6
            assert difference(api.inference(clip), api(clip)) == 0.0


NESTED = Case("da3-nested-upstream", "da3", upstream.da3_nested, 3, DA3_PACKAGES)


@pytest.mark.skipif(bool(missing(NESTED)), reason="NOT VERIFIED: Depth-Anything-3 is missing")
def test_upstream_nested_network_is_reduced_in_its_any_view_branch() -> None:
    model, clip = build(NESTED), images(NESTED, 6)
    dense = run(model, clip)
    metric = run(model.get_submodule("da3_metric"), clip)
    with spark3r.apply(model, Schedule.dense(3)):
        assert difference(run(model, clip), dense) == 0.0
    with spark3r.apply(model, reducing(3)) as handle:
        assert all(name.startswith("da3.backbone.pretrained.blocks.") for name in handle.layers)
        reduced = run(model, clip)
        assert difference(run(model.get_submodule("da3_metric"), clip), metric) == 0.0
    assert difference(reduced, dense) > 1e-6
    assert all(bool(value.isfinite().all()) for value in reduced.values())
    assert difference(run(model, clip), dense) == 0.0


def _noting_layouts(model: nn.Module) -> tuple[Family, list[TokenLayout]]:
    """Return the model's family, and a list that it adds every token layout to."""
    seen: list[TokenLayout] = []
    family = detect(model)

    def layout(*args: Any) -> tuple[int, TokenLayout]:
        batch, found = family.layout(*args)
        seen.append(found)
        return batch, found

    return replace(family, layout=layout), seen
