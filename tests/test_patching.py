"""Applying, pausing, replacing and removing a schedule on a live model."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from conftest import make_images, make_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import spark3r
from spark3r import (
    FamilyError,
    LayerRule,
    LayoutError,
    LengthRule,
    Operators,
    PatchError,
    Profile,
    ProfileError,
    Schedule,
    Spark3rWarning,
)
from spark3r.families import detect, generic
from spark3r.fingerprint import describe
from spark3r.handle import Handle
from spark3r.layout import TokenLayout

REDUCED = Schedule(
    (LayerRule(3, 1), LayerRule(2, 3)), Operators(group=4), LengthRule(max_frames=100)
)
FAITHFUL = Schedule(
    (LayerRule(1, 4), LayerRule(4, 2)),
    Operators(key_value="token_stride", keep_anchor=True, mass_correction=1.0),
)


def depth(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images)["depth"]


def snapshot(model: nn.Module) -> list[tuple[type, list[str], int, int]]:
    """What a patch could leave behind on every module."""
    return [
        (
            type(module),
            sorted(module.__dict__),
            len(module._forward_pre_hooks),
            len(module._forward_hooks) + len(module._forward_hooks_always_called),
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("schedule", [REDUCED, FAITHFUL])
def test_outputs_keep_their_shapes_and_removal_restores_bit_for_bit(model, schedule):
    images = make_images(9)
    before, dense = snapshot(model), model(images)
    keys = list(model.state_dict())
    handle = spark3r.apply(model, schedule)
    assert list(model.state_dict()) == keys
    assert spark3r.is_applied(model)
    assert handle.is_active
    reduced = model(images)
    assert {k: v.shape for k, v in reduced.items()} == {k: v.shape for k, v in dense.items()}
    assert not torch.equal(reduced["depth"], dense["depth"])
    handle.remove()
    assert snapshot(model) == before
    assert not spark3r.is_applied(model)
    assert not handle.is_active
    for key, value in model(images).items():
        assert torch.equal(value, dense[key])
    handle.remove()  # nothing happens twice
    spark3r.remove(model)
    assert snapshot(model) == before


def test_a_schedule_of_ones_changes_nothing(model):
    images = make_images(7)
    dense = depth(model, images)
    with spark3r.apply(model, Schedule.dense(2)):
        assert torch.equal(depth(model, images), dense)


def test_ones_forced_through_our_own_path_change_nothing(model):
    family = detect(model)
    captured = {}

    def capture(module, args, output):
        captured[module] = (args, output)

    for module in family.attention(model).values():
        module.register_forward_hook(capture)
    depth(model, make_images(5))
    layout = TokenLayout(5, 3, 2, special=5, anchor_frame=0)
    assert len(captured) == 2
    for module, (args, output) in captured.items():
        with torch.no_grad():
            ours = family.attend(module, layout, LayerRule(1, 1, Operators()), *args)
        assert torch.equal(ours, output)


def test_keys_projected_after_pruning_are_those_pruned_after_projection(model):
    family = detect(model)
    x = torch.randn(1, 5 * 11, 128)
    rope = (torch.randn(55, 32), torch.randn(55, 32))
    layout = TokenLayout(5, 3, 2, special=5, anchor_frame=0)
    module = next(iter(family.attention(model).values()))
    rule = LayerRule(1, 2, Operators())
    with torch.no_grad():
        ours = family.attend(module, layout, rule, x, rope)
        module.qkv.register_forward_hook(lambda *_: None)  # no longer sliceable
        assert torch.allclose(family.attend(module, layout, rule, x, rope), ours, atol=1e-6, rtol=0)


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
    with spark3r.apply(model, schedule):
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


def test_a_deep_copy_is_independent(model):
    images = make_images(6)
    dense = depth(model, images)
    handle = spark3r.apply(model, REDUCED)
    reduced = depth(model, images)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.01)
    changed = depth(twin, images)
    assert not torch.equal(changed, reduced)
    assert torch.equal(depth(model, images), reduced)
    handle.remove()
    assert torch.equal(depth(model, images), dense)
    assert spark3r.is_applied(twin)
    assert torch.equal(depth(twin, images), changed)
    spark3r.remove(twin)
    assert not spark3r.is_applied(twin)
    assert snapshot(twin) == snapshot(model)
    assert not torch.equal(depth(twin, images), changed)


@pytest.mark.filterwarnings("ignore::spark3r.Spark3rWarning")  # one frame clamps
def test_two_threads_of_mixed_lengths_agree_with_one():
    model = make_model()
    handle = spark3r.apply(model, REDUCED)
    clips = {frames: make_images(frames, 16, 16) for frames in range(1, 12)}
    expected = {frames: depth(model, clip) for frames, clip in clips.items()}
    wrong: list[object] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(200):
                frames = int(torch.randint(1, 12, (), generator=generator))
                if not torch.equal(depth(model, clips[frames]), expected[frames]):
                    wrong.append(frames)
        except Exception as error:  # a thread's error must fail the test
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert handle._passes._running == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_under_gradient_checkpointing_sees_its_own_layout(reentrant):
    model = make_model().train()
    twin = copy.deepcopy(model)
    for block in (*model.aggregator.frame_blocks, *model.aggregator.global_blocks):
        block.forward = lambda x, rope, block=block: checkpoint(
            type(block).forward, block, x, rope, use_reentrant=reentrant
        )
    spark3r.apply(model, FAITHFUL)
    spark3r.apply(twin, FAITHFUL)
    clips = [make_images(5), make_images(8), make_images(3, 32, 16)]
    losses = [model(clip)["depth"].sum() for clip in clips]
    for loss in reversed(losses):  # recomputed long after other clips went through
        loss.backward()
    for clip in clips:
        twin(clip)["depth"].sum().backward()
    for (name, ours), plain in zip(model.named_parameters(), twin.parameters(), strict=True):
        if plain.grad is not None:
            torch.testing.assert_close(ours.grad, plain.grad, msg=name)


def test_equal_token_counts_of_different_grids_are_told_apart_or_refused(model):
    tall, wide = make_images(4, 32, 16), make_images(4, 16, 32)
    with torch.no_grad():
        expected = {}
        for name, clip in (("tall", tall), ("wide", wide)):
            fresh = make_model()
            spark3r.apply(fresh, FAITHFUL)
            expected[name] = depth(fresh, clip)
        spark3r.apply(model, FAITHFUL)
        for name, clip in (("tall", tall), ("wide", wide), ("tall", tall)):
            assert torch.equal(depth(model, clip), expected[name])
    for training in (True, False):  # gradients are recorded either way
        model.train(training)
        loss = model(tall)["depth"].sum()
        with pytest.raises(LayoutError, match=r"backward pass to come, .* run that first"):
            model(wide)
        loss.backward()
        model(wide)["depth"].sum().backward()


def test_a_pass_that_fails_leaves_no_trace(model):
    handle = spark3r.apply(model, REDUCED)
    block = model.aggregator.global_blocks[1]
    hook = block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        depth(model, make_images(4))
    hook.remove()
    assert handle._passes._running == []
    assert depth(model, make_images(4)).isfinite().all()


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


def test_autocast_runs_reduced(model):
    images = make_images(8)
    spark3r.apply(model, FAITHFUL)
    full = depth(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = depth(model, images)
    assert low.isfinite().all()
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_patched_model_runs_in_other_precisions(model, dtype):
    images = make_images(8)
    spark3r.apply(model, FAITHFUL)
    full = depth(model, images)
    other = depth(model.to(dtype), images)
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(other.float(), full, rtol=tolerance, atol=tolerance)


def test_gradients_of_the_patched_model_are_those_of_finite_differences():
    model = make_model(seed=3).double()
    spark3r.apply(model, FAITHFUL)
    images = make_images(6, 16, 16).double()
    weight = model.aggregator.global_blocks[0].attn.qkv.weight
    direction = torch.randn_like(weight)
    model(images)["depth"].sum().backward()
    analytic = float((weight.grad * direction).sum())
    step = 1e-3
    with torch.no_grad():
        weight += step * direction
        above = depth(model, images).double().sum()
        weight -= 2 * step * direction
        below = depth(model, images).double().sum()
    # The outputs are float32, whatever the model: hence the wide step and tolerance.
    assert float(above - below) / (2 * step) == pytest.approx(analytic, rel=0.02)


def test_the_patched_model_runs_on_the_meta_device(model):
    spark3r.apply(model, FAITHFUL)
    output = model.to("meta")(torch.empty(6, 3, 24, 16, device="meta"))
    assert output["depth"].shape == (1, 6, 24, 16, 1)


def test_calling_the_aggregator_directly_is_supported(model):
    images = make_images(6)
    spark3r.apply(model, REDUCED)
    tokens, _ = model.aggregator(images[None])
    assert tokens.shape == (1, 6, 11, 128)


def test_a_call_that_bypasses_the_entry_module_says_how_to_call(model):
    spark3r.apply(model, REDUCED)
    attn = model.aggregator.global_blocks[0].attn
    with pytest.raises(LayoutError, match=r"entry module runs: model\(images\) or model.aggreg"):
        attn(torch.zeros(1, 22, 128), (torch.zeros(22, 32), torch.zeros(22, 32)))


def test_applying_inside_a_forward_pass_is_refused(model):
    dense = depth(model, make_images(3))
    model.aggregator.frame_blocks[0].register_forward_hook(
        lambda *_: spark3r.apply(model, REDUCED) and None
    )
    with pytest.raises(PatchError, match="forward pass of ReferenceModel is under way"):
        depth(model, make_images(3))
    assert not spark3r.is_applied(model)
    model.aggregator.frame_blocks[0]._forward_hooks.clear()
    assert torch.equal(depth(model, make_images(3)), dense)


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


def test_unknown_model_is_told_how_to_use_generic():
    with pytest.raises(FamilyError, match=r"Linear is of no family .*generic\("):
        spark3r.apply(nn.Linear(2, 2), Schedule.dense(2))


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
    Handle(model, detect(model), REDUCED, frozenset({(3, 2)})).install()
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
    assert "group=4" in text
    faithful = str(spark3r.apply(model, FAITHFUL))
    assert "mass_correction=1.0" in faithful
    assert "keep_anchor=True" in faithful
    handle.remove()
    assert "(removed)" in str(handle)


def test_permuting_other_frames_of_a_group_permutes_the_output(model):
    # Keys and values of frames 0, 3, 6: the kept ones among themselves may change places.
    spark3r.apply(model, Schedule.uniform(2, 1, 3))
    images = make_images(9)
    order = torch.tensor([0, 1, 2, 6, 4, 5, 3, 7, 8])
    torch.testing.assert_close(
        depth(model, images[order]), depth(model, images)[:, order], rtol=1e-4, atol=1e-4
    )


def generic_reference(**changes):
    options = {"entry": "aggregator", "patch_size": 8, "special": 5, "anchor_frame": 0}
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


def test_generic_mistakes_are_named(model):
    images = make_images(4)
    with pytest.raises(FamilyError, match="no module of ReferenceModel is called like 'blocks"):
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


def profile_of(model, **changes):
    family = detect(model)
    record = describe(family.name, family.attention(model), family.facts(model))
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
