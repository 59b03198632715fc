import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import make_model

import spark3r
import spark3r.reference.model as architecture
from spark3r import Schedule
from spark3r.families.parts import memory
from spark3r.geometry import decode_pose
from spark3r.reference import ReferenceModel, load
from spark3r.reference.model import PAIRS
from spark3r.rope import apply_rope, make_rope


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return load(weights="random")


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(1, 64, 64), (2, 64, 64), (5, 32, 96), (3, 128, 64)]
)
@torch.no_grad()
def test_shapes_and_conventions(
    model: ReferenceModel, frames: int, height: int, width: int
) -> None:
    output = model(images(2, frames, 3, height, width))
    assert output["pose_enc"].shape == (2, frames, 9)
    assert output["depth"].shape == (2, frames, height, width, 1)
    assert output["depth_conf"].shape == (2, frames, height, width)
    assert all(value.dtype == torch.float32 for value in output.values())
    assert all(torch.isfinite(value).all() for value in output.values())
    assert (output["depth"] > 0).all()
    assert (output["depth_conf"] > 1).all()
    extrinsics, intrinsics = decode_pose(output["pose_enc"], (height, width))
    # The world is the first camera.
    torch.testing.assert_close(extrinsics[:, 0], torch.eye(3, 4).expand(2, 3, 4))
    assert (intrinsics[..., 0, 0] > 0).all()
    norm = output["pose_enc"][..., 3:7].norm(dim=-1)
    torch.testing.assert_close(norm, torch.ones(2, frames))
    fov = output["pose_enc"][..., 7:]
    assert ((fov > 0) & (fov < math.pi)).all()


@torch.no_grad()
def test_a_clip_without_batch_dimension_is_a_batch_of_one(model: ReferenceModel) -> None:
    clip = images(3, 3, 64, 64)
    for name, value in model(clip).items():
        assert torch.equal(value, model(clip[None])[name])


@torch.no_grad()
def test_batched_clips_do_not_see_each_other(model: ReferenceModel) -> None:
    clips = images(3, 4, 3, 64, 64)
    together = model(clips)
    for index in range(3):
        for name, value in model(clips[index]).items():
            torch.testing.assert_close(together[name][index], value[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_permuting_other_frames_permutes_outputs(model: ReferenceModel) -> None:
    clip = images(6, 3, 64, 64)
    order = torch.tensor([0, 4, 2, 5, 1, 3])
    straight, permuted = model(clip), model(clip[order])
    for name, value in straight.items():
        torch.testing.assert_close(permuted[name][0], value[0, order], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_frames_mix_in_global_blocks_only(model: ReferenceModel) -> None:
    clip = images(3, 3, 64, 64)
    other = clip.clone()
    other[2] = images(3, 64, 64, seed=1)
    assert not torch.equal(model(clip)["depth"][0, 1], model(other)["depth"][0, 1])
    saved = [block.forward for block in model.aggregator.global_blocks]
    try:
        for block in model.aggregator.global_blocks:
            block.forward = lambda x, rope: x
        for name, value in model(clip).items():
            assert torch.equal(value[0, :2], model(other)[name][0, :2])
    finally:
        for block, forward in zip(model.aggregator.global_blocks, saved, strict=True):
            del block.forward
            assert block.forward == forward


def test_token_layout(model: ReferenceModel) -> None:
    aggregator = model.aggregator
    assert aggregator.patch_start_idx == 5
    assert aggregator.patch_size == 8
    assert len(aggregator.frame_blocks) == len(aggregator.global_blocks) == 8
    assert aggregator.camera_token.shape == (1, 2, 1, 128)
    assert aggregator.register_token.shape == (1, 2, 4, 128)
    with torch.no_grad():
        tokens, _ = aggregator(images(2, 3, 3, 64, 48))
    assert tokens.shape == (2, 3, 5 + 8 * 6, 128)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 1, 64, 64), (2, 3, 60, 64), (1, 2, 4, 64, 64)])
def test_wrong_images_are_refused(model: ReferenceModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        model(images(*shape))


def test_meta_device() -> None:
    with torch.device("meta"):
        model = ReferenceModel()
    output = model(torch.empty(2, 7, 3, 64, 96, device="meta"))
    assert output["depth"].shape == (2, 7, 64, 96, 1)


@pytest.mark.parametrize(
    ("pairs", "lengths", "backend"),
    [
        pytest.param(1, (3,), "eager", marks=pytest.mark.slow),
        pytest.param(PAIRS, (1, 2, 3, 6), "eager", marks=pytest.mark.slow),
        pytest.param(PAIRS, (1, 2, 3, 6), "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_compiles_without_graph_break(pairs: int, lengths: tuple[int, ...], backend: str) -> None:
    torch._dynamo.reset()
    model = make_model(pairs)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for frames in lengths:
            clip = images(frames, 3, 64, 64)
            torch.testing.assert_close(
                compiled(clip)["depth"], model(clip)["depth"], atol=1e-4, rtol=1e-4
            )


@torch.no_grad()
def test_autocast_keeps_outputs_fp32_and_close(model: ReferenceModel) -> None:
    clip = images(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(clip)
    high = model(clip)
    assert low["pose_enc"].dtype == torch.float32
    assert (low["depth"].log() - high["depth"].log()).abs().mean() < 0.05


def test_gradient_checkpointing_of_blocks(model: ReferenceModel) -> None:
    block = model.aggregator.global_blocks[0]
    rope = make_rope(8, 8, 5, 32, torch.device("cpu"))
    x = images(1, 69, 128).requires_grad_()
    block(x, rope).square().sum().backward()
    expected, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(block, x, rope, use_reentrant=False).square().sum().backward()
    model.zero_grad(set_to_none=True)
    assert expected is not None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


def test_rope_depends_on_relative_position_only() -> None:
    cos, sin = make_rope(6, 7, 5, 32, torch.device("cpu"))
    q, k = images(32), images(32, seed=1)

    def product(first: int, second: int) -> torch.Tensor:
        turned = [
            apply_rope(t.view(1, 1, 1, 32), (cos[[i]], sin[[i]]))
            for t, i in ((q, first), (k, second))
        ]
        return (turned[0] * turned[1]).sum()

    start, row = 5, 7
    torch.testing.assert_close(product(start, start + 1), product(start + 2 * row, start + 15))
    torch.testing.assert_close(product(start, start + row), product(start + 3, start + 3 + row))
    assert not torch.allclose(product(start, start + 1), product(start, start + row))
    torch.testing.assert_close(product(0, 4), q @ k)  # special tokens stand at the origin


def test_rope_refuses_odd_heads() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        make_rope(2, 2, 5, 30, torch.device("cpu"))


def test_random_weights_follow_the_seed_and_leave_the_random_state() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (load(weights="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    name = "aggregator.global_blocks.0.attn.qkv.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert not first.training


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load(weights=tmp_path / "missing.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not hold the reference model"):
        load(weights=tmp_path / "other.safetensors")


@torch.no_grad()
def test_stem_and_depth_head_in_pieces(
    model: ReferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = torch.rand(7, 3, 16, 24)
    whole = model(clip)
    monkeypatch.setattr(architecture, "FRAMES_AT_A_TIME", 3)
    calls: list[int] = []
    hook = model.depth_head.register_forward_pre_hook(lambda head, args: calls.append(len(args[0])))
    parts = model(clip)
    hook.remove()
    assert calls == [3, 3, 1]
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_memory_saver_gives_the_same_bits(
    model: ReferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MOST_FRAMES", 4)
    monkeypatch.setattr(memory, "MOST_TOKENS", 64)
    clip = torch.rand(11, 3, 16, 24)
    for schedule in (Schedule.dense(8), Schedule.uniform(8, 2, 4)):
        with spark3r.apply(model, schedule, save_memory=False):
            whole = model(clip)
        with spark3r.apply(model, schedule):
            saved = model(clip)
        assert all(torch.equal(saved[name], value) for name, value in whole.items())
