"""VGGT's memory savers drop the outputs that no head reads, and nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy

import pytest
import stand_ins
import torch
import torch.nn.functional as F
from family_cases import CASES, Case, build, difference, images, run
from torch import Tensor, nn

import spark3r
from spark3r import LayoutError, Schedule
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


READ = {
    "mean": lambda tokens: tokens.mean(dim=2),
    "sum": lambda tokens: tokens.sum(),
    "numpy": lambda tokens: tokens.detach().numpy(),
    "list": lambda tokens: tokens.tolist(),
    "attention": lambda tokens: F.scaled_dot_product_attention(
        torch.ones(1, 1, 1, tokens.shape[-1], dtype=tokens.dtype), tokens, tokens
    ),
    "pooled": lambda tokens: tokens.transpose(2, 3) @ tokens,
    "joined": lambda tokens: torch.cat(
        (tokens, torch.ones(*tokens.shape[:2], 1, tokens.shape[3])), 2
    ),
    "saved": lambda tokens: torch.save(tokens, io.BytesIO()),
}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_whoever_reads_dropped_tokens_gets_an_error(
    case: Case, read: Callable[[Tensor], object]
) -> None:
    model, clip = _heads_on(build(case), [0, 0, -1, -1]), images(case, 3)
    read(_tokens(model, clip)[1])
    with spark3r.apply(model, Schedule.dense(case.layers)):
        dropped = _tokens(model, clip)[1]
    with pytest.raises(LayoutError, match="dropped them: apply the schedule with save_memory=Fa"):
        read(dropped)
    with pytest.raises(LayoutError, match="dropped them"):
        read(dropped.cpu().half()[:, 1:].flatten(0, 1)[None])
    assert dropped.shape == (1, 3, 0, dropped.shape[-1])
    assert repr(dropped).startswith("Dropped([], size=(1, 3, 0, ")


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
