from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import spark3r
from spark3r import Clip, FamilyError, Schedule
from spark3r.families import generic
from spark3r.layout import TokenLayout
from spark3r.patching.wall import apply_wall, fewest_keys
from spark3r.reduction.pruning import key_value_length
from spark3r.runner import first_attention_call, layout_of, predict, run

LAYERS = 2  # of the model in small_models


def without_attention(model: nn.Module) -> nn.Module:
    """The oracle: the same model with global attention that only projects zeros."""
    oracle = copy.deepcopy(model)
    for block in oracle.aggregator.global_blocks:  # type: ignore[union-attr]
        block.attn.forward = lambda x, rope, attn=block.attn: attn.proj(torch.zeros_like(x))
    return oracle


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_global_attention_returns_zeros(model: nn.Module, frames: int) -> None:
    images = torch.rand(frames, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with apply_wall(model):
        at_wall = run(model, images)
    expected = run(without_attention(model), images)
    for name, value in expected.items():
        torch.testing.assert_close(at_wall[name], value, rtol=0, atol=0)
    dense = run(model, images)
    assert not torch.equal(dense["depth"], at_wall["depth"])


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    images = torch.rand(3, 3, 16, 16)
    before = run(model, images)["depth"]
    with apply_wall(model):
        assert spark3r.is_applied(model)
    assert not spark3r.is_applied(model)
    assert torch.equal(run(model, images)["depth"], before)


def test_keys_and_values_of_one_frame_only_are_projected(model: nn.Module) -> None:
    seen: list[int] = []

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is nn.functional.linear and args[1].shape == (256, 128):
                seen.append(args[0].shape[1])
            return func(*args, **(kwargs or {}))

    images = torch.rand(4, 3, 16, 16)
    with apply_wall(model), Counting():
        run(model, images)
    assert seen.count(4 + 5) == LAYERS
    assert 4 * (4 + 5) not in seen


@pytest.mark.parametrize("frames", [1, 2, 300])
def test_fewest_keys_are_those_of_a_frame_at_most(frames: int) -> None:
    layout = TokenLayout(frames, 4, 6, special=5, anchor_frame=0)
    assert 0 < key_value_length(layout, fewest_keys(layout)) <= layout.tokens_per_frame


class Toy(nn.Module):
    """A model no family knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * 64, 8)
        self.attn = ToyAttention()

    def forward(self, images: Tensor) -> Tensor:
        patches = nn.functional.unfold(images.flatten(0, 1), 8, stride=8).transpose(1, 2)
        tokens = self.embed(patches).reshape(images.shape[0], -1, 8)
        return tokens + self.attn(tokens)


class ToyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        attended: Tensor = nn.functional.scaled_dot_product_attention(q, k, v)
        return attended.transpose(1, 2).flatten(2)


class FullPrecisionQueries(ToyAttention):
    """Queries and keys in float32 also under autocast, where a norm leaves VGGT's."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        attended: Tensor = nn.functional.scaled_dot_product_attention(q.float(), k.float(), v)
        return attended.transpose(1, 2).flatten(2)


def test_zeros_have_the_precision_of_the_products_they_stand_for() -> None:
    family = generic("attn", patch_size=8)
    toy = Toy().eval()
    toy.attn = FullPrecisionQueries()
    seen: list[torch.dtype] = []
    toy.attn.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    images = torch.rand(3, 3, 16, 16)
    run(toy, images, family, torch.bfloat16)
    with apply_wall(toy, family):
        run(toy, images, family, torch.bfloat16)
    assert seen == [torch.bfloat16] * 2


def test_the_generic_family_has_a_wall_too() -> None:
    family = generic("attn", patch_size=8)
    toy = Toy().eval()
    images = torch.rand(3, 3, 16, 16)
    with apply_wall(toy, family):
        at_wall = run(toy, images, family)
    patches = nn.functional.unfold(images, 8, stride=8).transpose(1, 2)
    with torch.inference_mode():
        assert torch.equal(at_wall, toy.embed(patches).reshape(1, -1, 8))


def test_a_prediction_needs_a_family_that_reads_outputs() -> None:
    clip = Clip("toy", torch.rand(2, 3, 16, 16))
    with pytest.raises(FamilyError, match="cannot read the model's output"):
        predict(Toy(), clip, generic("attn", patch_size=8))


def test_a_prediction_of_a_clip(model: nn.Module) -> None:
    prediction = predict(model, Clip("noise", torch.rand(3, 3, 16, 24)))
    assert prediction.depth.shape == (3, 16, 24)
    assert prediction.depth.device.type == "cpu"


def test_the_layout_and_the_first_attention_call_of_a_pass(model: nn.Module) -> None:
    images = torch.rand(3, 3, 16, 24)
    layout = layout_of(model, images)
    assert layout == TokenLayout(3, 2, 3, special=5, anchor_frame=0)
    module, args, kwargs, lowered = first_attention_call(model, images)
    assert module is model.aggregator.global_blocks[0].attn  # type: ignore[union-attr,index]
    assert args[0].shape == (1, layout.tokens, 128)
    assert kwargs == {}
    assert lowered == torch.float32
    assert not model.aggregator._forward_pre_hooks  # type: ignore[union-attr]
    with spark3r.apply(model, Schedule.uniform(LAYERS, 1, 2)):
        assert layout_of(model, images) == layout
        assert run(model, images)["depth"].shape == (1, 3, 16, 24, 1)
