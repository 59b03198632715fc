"""VGGT's memory savers drop the outputs that no head reads, and nothing else."""

from __future__ import annotations

from copy import deepcopy

import pytest
import stand_ins
import torch
from family_cases import CASES, Case, build, difference, images, run
from torch import Tensor, nn

import spark3r
from spark3r import Schedule
from spark3r.families.parts.vggt_memory import unread_layers

VGGT = [case for case in CASES if case.family == "vggt"]


@pytest.fixture(params=VGGT, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def _heads_on(model: nn.Module, layers: list[int]) -> nn.Module:
    """Return a copy whose dense heads read some layers only, of which they need four."""
    copy = deepcopy(model)
    for module in copy.modules():
        if hasattr(module, "intermediate_layer_idx"):
            module.intermediate_layer_idx = layers
    return copy


def test_unread_layers_are_empty_and_outputs_the_same(case: Case) -> None:
    last = case.layers - 1
    model, clip = _heads_on(build(case), [0, 0, last, last]), images(case, 4, batch=2)
    dense = run(model, clip)
    with spark3r.apply(model, Schedule.dense(case.layers)):
        assert difference(run(model, clip), dense) == 0.0
        tokens = _tokens(model, clip)
    whole = _tokens(model, clip)
    assert len(tokens) == len(whole) == case.layers
    for i, (kept, full) in enumerate(zip(tokens, whole, strict=True)):
        if i in (0, last):
            assert torch.equal(kept, full)
        else:
            assert kept.shape == (2, 4, 0, full.shape[-1])
            assert kept.untyped_storage().nbytes() == 0


def test_it_can_be_switched_off_and_comes_off(case: Case) -> None:
    model, clip = _heads_on(build(case), [0, 0, -1, -1]), images(case, 3)
    with spark3r.apply(model, Schedule.dense(case.layers), save_memory=False):
        assert all(tokens.numel() for tokens in _tokens(model, clip))
    before = set(vars(model.get_submodule("aggregator")))
    with spark3r.apply(model, Schedule.dense(case.layers)) as handle, handle.disabled():
        assert not all(tokens.numel() for tokens in _tokens(model, clip))
    assert set(vars(model.get_submodule("aggregator"))) == before
    assert all(tokens.numel() for tokens in _tokens(model, clip))


def test_a_copy_has_its_own(case: Case) -> None:
    model, clip = _heads_on(build(case), [0, 0, -1, -1]), images(case, 3)
    with spark3r.apply(model, Schedule.dense(case.layers)):
        copy = deepcopy(model)
    assert not all(tokens.numel() for tokens in _tokens(copy, clip))
    with torch.no_grad():
        for value in copy.parameters():
            value.mul_(0.5)
    spark3r.remove(copy)
    dense = _tokens(copy, clip)[-1]
    with spark3r.apply(copy, Schedule.dense(case.layers)):
        assert torch.equal(_tokens(copy, clip)[-1], dense)


def test_what_counts_as_read() -> None:
    model = stand_ins.Vggt()
    assert unread_layers(model, 3) == {1}
    model.depth_head.intermediate_layer_idx = [0]
    assert unread_layers(model, 3) == {1}, "the camera head reads the last layer"
    model.tracker = nn.Module()
    model.tracker.feature_extractor = nn.Module()
    model.tracker.feature_extractor.intermediate_layer_idx = [1]
    assert unread_layers(model, 3) == frozenset()
    assert unread_layers(model.aggregator, 3) == frozenset()  # its reader is unknown


def _tokens(model: nn.Module, clip: Tensor) -> list[Tensor]:
    with torch.no_grad():
        tokens: list[Tensor] = model.get_submodule("aggregator")(clip)[0]
    return tokens
