"""Blocks and MLPs that run in pieces return the same bits, and nothing else notices."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import stand_ins
import torch
from family_cases import CASES, Case, attentions, build, difference, images, quiet, reducing, run
from torch import Tensor, nn

import spark3r
from spark3r import Schedule
from spark3r.families.parts import memory
from spark3r.families.registry import detect

FRAMES, TOKENS = 4, 64
UPSTREAM_DA3 = [case for case in CASES if case.family == "da3" and case.needs]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_FRAMES", FRAMES)
    monkeypatch.setattr(memory, "MOST_TOKENS", TOKENS)


def _in_pieces(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that run in pieces while a schedule is applied."""
    ours = (memory._frames_in_pieces, memory._tokens_in_pieces)
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(vars(module).get("forward"), "func", None) in ours
    }


@pytest.mark.usefixtures("small_pieces")
def test_pieces_give_the_same_bits(case: Case) -> None:
    model, clip = build(case), images(case, 11)
    dense = run(model, clip)
    whole = spark3r.apply(model, reducing(case.layers), save_memory=False)
    reduced = run(model, clip)
    assert not _in_pieces(model)
    whole.remove()
    with spark3r.apply(model, Schedule.dense(case.layers)) as handle:
        assert difference(run(model, clip), dense) == 0.0
        with handle.disabled():
            assert difference(run(model, clip), dense) == 0.0
    with spark3r.apply(model, reducing(case.layers)):
        assert difference(run(model, clip), reduced) == 0.0
    assert not _in_pieces(model)


@pytest.mark.usefixtures("small_pieces")
def test_every_piece_is_small(case: Case) -> None:
    model, clip = build(case), images(case, 11)
    sizes: dict[str, list[int]] = {}
    with spark3r.apply(model, reducing(case.layers), guard=False):
        cut = _in_pieces(model)
        hooks = [
            inner.register_forward_pre_hook(
                lambda inner, args, name=name: sizes.setdefault(name, []).append(_count(args[0]))
            )
            for name, module in cut.items()
            for inner in [next(child for child in module.modules() if _is_linear(child))]
        ]
        run(model, clip)
    for hook in hooks:
        hook.remove()
    assert len(cut) >= 2 * case.layers - 1, "frame blocks, and MLPs of global blocks"
    assert sizes.keys() == cut.keys()
    for name, counts in sizes.items():
        assert len(counts) > 1, name
        assert max(counts) <= max(TOKENS, FRAMES * (17 + 6)), name
        assert max(counts) - min(counts) <= 17 + 6, f"{name}: pieces of unequal size"


@pytest.mark.usefixtures("small_pieces")
def test_gradients_and_training_run_whole(case: Case) -> None:
    model, clip = deepcopy(build(case)), images(case, 11)
    name, attn = next(iter(attentions(model).items()))
    inner = next(module for module in model.get_submodule(name[: -len(".attn")]).mlp.children())
    with spark3r.apply(model, reducing(case.layers)):
        calls: list[int] = []
        inner.register_forward_pre_hook(lambda module, args: calls.append(_count(args[0])))
        with quiet():
            model(clip)
            model.train()
            run(model, clip)
    assert attn.qkv.weight.requires_grad
    assert len(calls) == 2
    assert calls[0] == calls[1] > TOKENS


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("unmerge", ["copy", "linear"])
def test_merged_queries_run_in_pieces(case: Case, unmerge: str) -> None:
    model, clip = build(case), images(case, 11, batch=2)
    schedule = reducing(case.layers, unmerge=unmerge)
    sizes: dict[str, list[int]] = {}
    hooks = [
        attn.proj.register_forward_pre_hook(
            lambda proj, args, name=name: sizes.setdefault(name, []).append(_count(args[0]))
        )
        for name, attn in attentions(model).items()
    ]

    def reduced(save_memory: bool) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        sizes.clear()
        with spark3r.apply(model, schedule, save_memory=save_memory, guard=False):
            return run(model, clip), dict(sizes)

    expected, whole = reduced(save_memory=False)
    found, cut = reduced(save_memory=True)
    with spark3r.apply(model, schedule, guard=False), quiet():
        sizes.clear()
        model(clip)  # with gradients
        assert sizes == whole
    for hook in hooks:
        hook.remove()
    assert difference(found, expected) == 0.0
    unmerged, *merged = cut.values()
    assert len(unmerged) == 1
    for counts in merged:
        assert [sum(counts)] == unmerged
        assert len(counts) == 3, "groups of 4, 4 and 3 frames"


@pytest.mark.usefixtures("small_pieces")
def test_updates_of_global_blocks_are_added_in_pieces(case: Case) -> None:
    model, clip = build(case), images(case, 11, batch=2)
    names = [name.removesuffix(".attn") for name in attentions(model)]
    counts: dict[str, list[int]] = {}
    hooks = [
        model.get_submodule(f"{name}.norm2").register_forward_pre_hook(
            lambda norm, args, name=name: counts.setdefault(name, []).append(_count(args[0]))
        )
        for name in names
    ]
    with spark3r.apply(model, reducing(case.layers)):
        run(model, clip)
    for hook in hooks:
        hook.remove()
    for each in counts.values():
        if case.family == "reference":  # its blocks are small, and run as they are
            assert len(each) == 1
        else:
            assert max(each) <= TOKENS
            assert max(each) - min(each) <= 1
    assert list(counts) == names


def test_a_block_of_another_kind_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stand_ins.Vggt()
    block = model.aggregator.global_blocks[0]
    with spark3r.apply(model, Schedule.dense(3)):
        assert "forward" in vars(block)
    own = type(block).forward
    monkeypatch.setattr(type(block), "forward", lambda self, x, **kw: 2 * own(self, x, **kw))
    with spark3r.apply(model, Schedule.dense(3)):
        assert "forward" not in vars(block)
        assert "forward" in vars(block.mlp)


def test_a_forward_of_its_own_is_left_alone() -> None:
    model = stand_ins.Vggt()
    block, mlp = model.aggregator.frame_blocks[1], model.aggregator.global_blocks[0].mlp
    own = [partial(type(module).forward, module) for module in (block, mlp)]
    block.forward, mlp.forward = own
    with spark3r.apply(model, Schedule.dense(3)):
        assert [vars(block)["forward"], vars(mlp)["forward"]] == own
        assert len(_in_pieces(model)) == 4


@pytest.mark.parametrize("case", UPSTREAM_DA3, ids=str)
def test_da3_keeps_one_copy_of_what_its_heads_read(case: Case) -> None:
    model, clip = build(case), images(case, 5)
    backbone: Any = detect(model).entry(model)
    exported = [backbone.out_layers[0]]

    def layers() -> tuple[Any, list[Tensor]]:
        with torch.no_grad():
            found: tuple[Any, list[Tensor]] = backbone(clip, export_feat_layers=exported)
        return found

    expected, expected_features = layers()
    with spark3r.apply(model, Schedule.dense(case.layers)):
        found, features = layers()
    assert len(found) == len(expected) == 4
    assert torch.equal(features[0], expected_features[0])
    for (tokens, camera), (whole, token) in zip(found, expected, strict=True):
        assert torch.equal(tokens, whole)
        assert torch.equal(camera, token)
        assert token.untyped_storage().nbytes() > 4 * token.numel(), "upstream's is a view"
        assert camera.untyped_storage().nbytes() == 4 * camera.numel()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _count(tokens: Tensor) -> int:
    return tokens[..., 0].numel()
