from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from toy_model import ToyAttention, ToyModel

import spark3r
from spark3r import LayerRule, PatchError, Schedule
from spark3r.families import generic
from spark3r.layout import TokenLayout
from spark3r.patching.apply import replace_attention
from spark3r.patching.wall import apply_wall, fewest_keys
from spark3r.reduction.plans import key_value_length
from spark3r.runner import Runner

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
    runner = Runner.of(model)
    with apply_wall(runner):
        at_wall = runner.run(images)
    expected = Runner.of(without_attention(model)).run(images)
    for name, value in expected.items():
        torch.testing.assert_close(at_wall[name], value, rtol=0, atol=0)
    dense = runner.run(images)
    assert not torch.equal(dense["depth"], at_wall["depth"])


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    images = torch.rand(3, 3, 16, 16)
    runner = Runner.of(model)
    before = runner.run(images)["depth"]
    with apply_wall(runner):
        assert spark3r.is_applied(model)
    assert not spark3r.is_applied(model)
    assert torch.equal(runner.run(images)["depth"], before)


def test_keys_and_values_of_one_frame_only_are_projected(model: nn.Module) -> None:
    seen: list[int] = []

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is nn.functional.linear and args[1].shape == (256, 128):
                seen.append(args[0].shape[1])
            return func(*args, **(kwargs or {}))

    images = torch.rand(4, 3, 16, 16)
    runner = Runner.of(model)
    with apply_wall(runner), Counting():
        runner.run(images)
    assert seen.count(4 + 5) == LAYERS
    assert 4 * (4 + 5) not in seen


@pytest.mark.parametrize("frames", [1, 2, 300])
def test_fewest_keys_are_those_of_a_frame_at_most(frames: int) -> None:
    layout = TokenLayout(frames, 4, 6, special=5, anchor_frame=0)
    assert 0 < key_value_length(layout, fewest_keys(layout)) <= layout.tokens_per_frame


class FullPrecisionQueries(ToyAttention):
    """Queries and keys in float32 also under autocast, where a norm leaves VGGT's."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        attended: Tensor = nn.functional.scaled_dot_product_attention(q.float(), k.float(), v)
        return attended.transpose(1, 2).flatten(2)


def test_zeros_have_the_precision_of_the_attention_they_replace() -> None:
    toy = ToyModel().eval()
    toy.attn = FullPrecisionQueries()
    runner = Runner.of(toy, generic("attn", patch_size=8), torch.bfloat16)
    seen: list[torch.dtype] = []
    toy.attn.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    images = torch.rand(3, 3, 16, 16)
    runner.run(images)
    with apply_wall(runner):
        runner.run(images)
    assert seen == [torch.bfloat16] * 2


def test_the_generic_family_has_a_wall_too() -> None:
    toy = ToyModel().eval()
    runner = Runner.of(toy, generic("attn", patch_size=8))
    images = torch.rand(3, 3, 16, 16)
    with apply_wall(runner):
        at_wall = runner.run(images)
    patches = nn.functional.unfold(images, 8, stride=8).transpose(1, 2)
    with torch.inference_mode():
        assert torch.equal(at_wall, toy.embed(patches).reshape(1, -1, 8))


def test_any_function_replaces_attention_and_the_earlier_schedule_is_back_if_it_fails(
    model: nn.Module,
) -> None:
    images = torch.rand(3, 3, 16, 16)
    runner = Runner.of(model)
    seen: list[TokenLayout] = []

    def forward(attn: nn.Module, layout: TokenLayout, x: Tensor, rope: object) -> Tensor:
        seen.append(layout)
        return type(attn).forward(attn, x, rope)

    dense = runner.run(images)["depth"]
    handle = spark3r.apply(model, Schedule.uniform(LAYERS, 1, 2))
    patch = replace_attention(runner, forward)
    assert not handle.is_active
    assert torch.equal(runner.run(images)["depth"], dense)
    assert seen == [runner.layout(images)] * LAYERS
    with patch.disabled():
        runner.run(images)
    assert len(seen) == LAYERS
    patch.remove()
    assert not spark3r.is_applied(model)

    attn = model.aggregator.global_blocks[1].attn  # type: ignore[union-attr,index]
    attn.forward = lambda *call: type(attn).forward(attn, *call)
    handle = spark3r.apply(
        model, Schedule((LayerRule(1, 2), LayerRule()))
    )  # a dense layer may have a forward of its own
    with pytest.raises(PatchError, match="has a forward of its own"):
        replace_attention(runner, forward)
    assert handle.is_active
