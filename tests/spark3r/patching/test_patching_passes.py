"""The pass of a patched layer: threads, checkpointing, failures, calls past the entry module."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from patched import FAITHFUL, REDUCED, depth
from small_models import make_images, make_model
from tiers import examples
from torch.utils.checkpoint import checkpoint

import spark3r
from spark3r import LayoutError


@pytest.mark.slow
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
            for _ in range(examples(200)):
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
    assert not handle._passes._running


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
    assert not handle._passes._running
    assert depth(model, make_images(4)).isfinite().all()


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
