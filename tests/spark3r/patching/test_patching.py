"""Applying, pausing, replacing and removing a schedule on a live model."""

from __future__ import annotations

import copy

import pytest
import torch
from patched import FAITHFUL, REDUCED, depth, snapshot
from small_models import make_images
from torch import nn

import spark3r
from spark3r import FamilyError, LayerRule, LayoutError, PatchError, Schedule
from spark3r.families import generic
from spark3r.families.registry import detect
from spark3r.layout import TokenLayout
from spark3r.patching.handle import Handle
from spark3r.reduction.rule import ResolvedRule


def test_a_handle_is_active_until_it_is_removed(model):
    before, keys = snapshot(model), list(model.state_dict())
    handle = spark3r.apply(model, FAITHFUL)
    assert list(model.state_dict()) == keys
    assert spark3r.is_applied(model)
    assert handle.is_active
    handle.remove()
    assert snapshot(model) == before
    assert not spark3r.is_applied(model)
    assert not handle.is_active
    handle.remove()  # nothing happens twice
    spark3r.remove(model)
    assert snapshot(model) == before


def test_keys_projected_after_pruning_are_those_pruned_after_projection(model):
    family = detect(model)
    x = torch.randn(1, 5 * 11, 128)
    rope = (torch.randn(55, 32), torch.randn(55, 32))
    layout = TokenLayout(5, 3, 2, special=5, anchor_frame=0)
    module = next(iter(family.attention(model).values()))
    rule = ResolvedRule(1, 2)
    with torch.no_grad():
        ours = family.reduced_forward(module, layout, rule, x, rope)
        module.qkv.register_forward_hook(lambda *_: None)  # no longer sliceable
        assert torch.allclose(
            family.reduced_forward(module, layout, rule, x, rope), ours, atol=1e-6, rtol=0
        )


def test_disabled_is_dense_for_a_while(model):
    images = make_images(6)
    dense = depth(model, images)
    handle = spark3r.apply(model, REDUCED)
    reduced = depth(model, images)
    with handle.disabled():
        assert torch.equal(depth(model, images), dense)
        with handle.disabled():
            assert torch.equal(depth(model, images), dense)
        assert torch.equal(depth(model, images), dense)
    assert torch.equal(depth(model, images), reduced)


def test_overlapping_pauses_end_with_the_last(model):
    images = make_images(6)
    dense = depth(model, images)
    handle = spark3r.apply(model, REDUCED)
    reduced = depth(model, images)
    first, second = handle.disabled(), handle.disabled()
    first.__enter__()
    second.__enter__()
    twin = copy.deepcopy(model)
    first.__exit__(None, None, None)
    assert torch.equal(depth(model, images), dense)
    second.__exit__(None, None, None)
    assert torch.equal(depth(model, images), reduced)
    assert torch.equal(depth(twin, images), reduced)  # a copy is not paused


def test_a_removed_handle_cannot_be_entered(model):
    handle = spark3r.apply(model, REDUCED)
    handle.remove()
    with pytest.raises(PatchError, match="apply it again"), handle:
        pass


def test_applying_again_replaces(model):
    images = make_images(6)
    dense = depth(model, images)
    first = spark3r.apply(model, REDUCED)
    second = spark3r.apply(model, FAITHFUL)
    assert not first.is_active
    faithful = depth(model, images)
    first.remove()  # the earlier handle no longer touches the model
    assert torch.equal(depth(model, images), faithful)
    second.remove()
    assert torch.equal(depth(model, images), dense)


def test_an_instances_own_forward_is_kept(model):
    images = make_images(4)
    attn = model.aggregator.global_blocks[0].attn
    calls = []

    def own(x, rope):
        calls.append(len(x))
        return type(attn).forward(attn, x, rope)

    attn.forward = own
    dense = depth(model, images)
    with pytest.raises(PatchError, match=r"global_blocks.0.attn has a forward of its own"):
        spark3r.apply(model, REDUCED)
    assert not spark3r.is_applied(model)
    schedule = Schedule((LayerRule(), LayerRule(2, 2)))  # dense where the override is
    with spark3r.apply(model, schedule, guard=False):
        depth(model, images)
    assert attn.forward is own
    assert len(calls) == 2
    assert torch.equal(depth(model, images), dense)


@pytest.mark.parametrize("step", range(7))
def test_a_failure_at_any_step_of_apply_leaves_the_model_as_it_was(model, step, monkeypatch):
    images = make_images(6)
    earlier = spark3r.apply(model, FAITHFUL)
    before, faithful = snapshot(model), depth(model, images)
    count = 0

    def failing(original):
        def wrapper(*args, **kwargs):
            nonlocal count
            if count == step:
                count += 1
                raise RuntimeError("injected")
            count += 1
            return original(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(Handle, "_set", failing(Handle._set))
        patch.setattr(
            nn.Module, "register_forward_pre_hook", failing(nn.Module.register_forward_pre_hook)
        )
        patch.setattr(nn.Module, "register_forward_hook", failing(nn.Module.register_forward_hook))
        with pytest.raises(RuntimeError, match="injected"):
            spark3r.apply(model, REDUCED)
    assert count > step
    assert snapshot(model) == before
    assert earlier.is_active
    assert torch.equal(depth(model, images), faithful)
    earlier.remove()
    assert not spark3r.is_applied(model)


def test_a_copy_stays_patched_when_the_original_is_restored(model):
    images = make_images(6)
    dense = depth(model, images)
    handle = spark3r.apply(model, REDUCED)
    reduced = depth(model, images)
    twin = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(depth(model, images), dense)
    assert spark3r.is_applied(twin)
    assert torch.equal(depth(twin, images), reduced)
    spark3r.remove(twin)
    assert snapshot(twin) == snapshot(model)
    assert torch.equal(depth(twin, images), dense)


def test_wrappers_are_seen_through(model, tmp_path):
    images = make_images(6)
    with spark3r.apply(model, REDUCED):
        reduced = depth(model, images)
    compiled = torch.compile(model, backend="eager")
    handle = spark3r.apply(compiled, REDUCED)
    assert spark3r.is_applied(model)
    handle.remove()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        with spark3r.apply(parallel, REDUCED):
            assert spark3r.is_applied(parallel)
            assert torch.equal(depth(parallel, images), reduced)
        assert not spark3r.is_applied(model)
    finally:
        torch.distributed.destroy_process_group()


def test_applying_inside_a_pass_is_refused(model):
    handle = spark3r.apply(model, REDUCED)
    reduced = depth(model, make_images(3))
    model.aggregator.frame_blocks[0].register_forward_hook(
        lambda *_: spark3r.apply(model, FAITHFUL) and None
    )
    with pytest.raises(PatchError, match="forward pass of ReferenceModel is under way"):
        depth(model, make_images(3))
    assert handle.is_active
    model.aggregator.frame_blocks[0]._forward_hooks.clear()
    assert torch.equal(depth(model, make_images(3)), reduced)
    spark3r.apply(model, FAITHFUL)


def test_an_interrupted_pass_is_no_longer_under_way(model):
    tall, wide = make_images(4, 32, 16), make_images(4, 16, 32)  # as many tokens
    handle = spark3r.apply(model, REDUCED)
    expected = depth(model, wide)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.aggregator.frame_blocks[0].register_forward_hook(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            depth(model, tall)
    hook.remove()
    assert torch.equal(depth(model, wide), expected)
    assert not handle._passes._running
    spark3r.apply(model, FAITHFUL)


def test_a_pass_inside_a_pass_is_told_from_an_interrupted_one(model):
    tall, wide = make_images(4, 32, 16), make_images(4, 16, 32)
    spark3r.apply(model, REDUCED)
    expected = depth(model, tall)
    nested = [make_images(3)]  # runs inside, and ends before the outer pass goes on

    def run_another(*_):
        if nested:
            depth(model, nested.pop())
            with pytest.raises(LayoutError, match="is still running"):
                model(wide)

    model.aggregator.frame_blocks[0].register_forward_hook(run_another)
    assert torch.equal(depth(model, tall), expected)
    assert not nested


def test_a_schedule_applied_during_an_unpatched_pass_says_so_in_its_first_layer(model):
    model.aggregator.frame_blocks[0].register_forward_hook(
        lambda *_: None if spark3r.is_applied(model) else spark3r.apply(model, REDUCED) and None
    )
    with pytest.raises(LayoutError, match="the schedule was applied while the pass was under way"):
        depth(model, make_images(3))


def test_wrong_number_of_layers(model):
    with pytest.raises(PatchError, match="has 5 layer rules, but ReferenceModel has 2 global"):
        spark3r.apply(model, Schedule.dense(5))
    assert not spark3r.is_applied(model)


def test_wrong_kinds_of_arguments_are_named(model):
    with pytest.raises(PatchError, match=r"model is a Schedule, expected a torch.nn.Module"):
        spark3r.apply(REDUCED, model)
    with pytest.raises(
        FamilyError, match=r"no family is named 'vgg', expected one of: .*reference"
    ):
        spark3r.apply(model, REDUCED, family="vgg")
    with pytest.raises(FamilyError, match="DataParallel copies modules"):
        spark3r.apply(nn.DataParallel(model), REDUCED)
    with pytest.raises(FamilyError, match="patch_size is 0, expected pixels"):
        generic("*.attn", patch_size=0)
    spark3r.apply(model, REDUCED, family="reference").remove()
