"""A runner: what it asks of a model, and the precision of its passes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import pytest
import stand_ins
import torch
from patched import REDUCED
from small_models import make_images, make_model
from torch import nn

import spark3r
from spark3r import Clip, FamilyError, LayoutError, Schedule, Spark3rError, Spark3rWarning
from spark3r.benchmark.api import bench
from spark3r.cli.arguments import chosen_dtype
from spark3r.families import generic
from spark3r.families.registry import FAMILIES
from spark3r.layout import TokenLayout
from spark3r.patching.handle import Handle
from spark3r.reconstruction import reconstruct
from spark3r.runner import Runner, autocast, default_dtype, device_of, dtype_name, matmul_dtype

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CPU = torch.device("cpu")


@pytest.fixture
def lowering(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model that turns autocast on by itself around its aggregator, as VGGT-Omega does."""

    def lowered(images: torch.Tensor) -> Any:
        with torch.autocast("cpu", BF16):
            return type(model).forward(model, images)

    monkeypatch.setattr(model, "forward", lowered)
    return model


@pytest.mark.parametrize(
    ("capability", "expected"), [(None, F32), ((7, 5), F16), ((8, 0), BF16), ((9, 0), BF16)]
)
def test_commands_run_in_half_precision_on_cuda(
    capability: tuple[int, int] | None, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_dtype("cuda:0") == expected
    assert default_dtype("cpu") == F32
    options = argparse.Namespace(dtype=None)
    assert chosen_dtype(options, "cuda") == expected
    assert chosen_dtype(argparse.Namespace(dtype="float32"), "cuda") == F32


@pytest.mark.parametrize(
    ("parameters", "asked", "expected"),
    [
        (F32, None, F32),
        (F32, F32, F32),
        (F32, BF16, BF16),
        (F32, F16, F16),
        (BF16, None, BF16),
        (BF16, F32, BF16),
        (BF16, F16, F16),
        (F64, BF16, F64),
    ],
)
def test_autocast_counts_and_otherwise_the_parameters(
    model: nn.Module, parameters: torch.dtype, asked: torch.dtype | None, expected: torch.dtype
) -> None:
    images = make_images(2, 16, 16)
    assert Runner.of(model.to(parameters), dtype=asked).precision(images) == expected
    assert matmul_dtype(F32, CPU) == F32


def test_none_leaves_autocast_as_it_is_and_float32_turns_it_off(model: nn.Module) -> None:
    images = make_images(2, 16, 16)
    with torch.autocast("cpu", BF16):
        assert Runner.of(model).precision(images) == BF16
        assert Runner.of(model, dtype=F32).precision(images) == F32
        with autocast(CPU, F32):
            assert matmul_dtype(F32, CPU) == F32


def test_a_model_may_turn_autocast_on_by_itself(lowering: nn.Module) -> None:
    images = make_images(3, 16, 16)
    runner = Runner.of(lowering, dtype=F32)
    assert runner.precision(images) == BF16
    assert runner.first_attention_call(images).autocast == BF16
    assert reconstruct(lowering, Clip("noise", images)).dtype == BF16


def test_a_pass_is_lowered_and_its_prediction_is_not(model: nn.Module) -> None:
    seen: list[torch.dtype] = []
    projection = model.aggregator.global_blocks[0].attn.qkv  # type: ignore[union-attr,index]
    projection.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    clip = Clip("noise", make_images(3, 16, 16))
    runner = Runner.of(model, dtype=BF16)
    prediction = runner.predict(clip)
    assert seen == [BF16]
    assert prediction.depth.dtype == prediction.extrinsics.dtype == F32
    with torch.inference_mode(), torch.autocast("cpu", BF16):
        expected = model(clip.images)
    assert torch.equal(runner.run(clip.images)["depth"], expected["depth"])
    assert {parameter.dtype for parameter in model.parameters()} == {F32}


def test_a_model_that_does_not_run_in_half_precision_says_so(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(2, 16, 16)

    def unsupported(*args: object) -> None:
        raise RuntimeError("not implemented for 'Half'\nat some place")

    monkeypatch.setattr(model, "forward", unsupported)
    with pytest.raises(
        Spark3rError, match=r"^the model .* run in float16 on cpu \(not [^\n]*\): use"
    ):
        Runner.of(model, dtype=F16).run(images)
    with pytest.raises(RuntimeError, match="not implemented"):
        Runner.of(model).run(images)
    with pytest.raises(
        Spark3rError, match=r"^the model .* parameters cast to bfloat16 \(not [^\n]*\): leave them"
    ):
        reconstruct(model.to(BF16), Clip("noise", images))


@pytest.mark.parametrize(("dtype", "tolerance"), [(BF16, 0.1), (F16, 0.02), (F64, 1e-4)])
def test_a_model_that_its_user_cast_runs_as_it_is(
    model: nn.Module, dtype: torch.dtype, tolerance: float
) -> None:
    clip = Clip("noise", make_images(3, 16, 16))
    expected = reconstruct(model, clip).run.prediction
    result = reconstruct(model.to(dtype), clip)
    assert result.dtype == dtype
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    found = result.run.prediction
    assert found.depth.dtype == (F64 if dtype == F64 else F32)
    assert found.points.dtype == found.extrinsics.dtype == found.depth.dtype
    assert float((found.depth.log() - expected.depth.log()).abs().max()) < tolerance
    assert bench(model, [2], ["dense"], grid=(2, 2), rounds=1).dtype == dtype_name(dtype)


class Noisy(nn.Module):
    """A block with dropout and running statistics, which count in training mode only."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.dropout, self.norm = block, nn.Dropout(0.5), nn.BatchNorm1d(128)

    def forward(self, x: torch.Tensor, rope: object) -> torch.Tensor:
        return self.norm(self.dropout(self.block(x, rope)).transpose(1, 2)).transpose(1, 2)


def test_passes_run_in_evaluation_mode_and_give_each_module_its_own_back(model: nn.Module) -> None:
    clip = Clip("noise", make_images(3, 16, 16))
    blocks = model.aggregator.frame_blocks  # type: ignore[union-attr]
    blocks[0] = Noisy(blocks[0])  # type: ignore[index,operator]
    expected = reconstruct(model.eval(), clip).run.prediction.depth
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    blocks[1].eval()  # type: ignore[index,operator]
    modes = [module.training for module in model.modules()]
    assert torch.equal(reconstruct(model, clip).run.prediction.depth, expected)
    bench(model, [2], ["dense", "uniform:2:2", "wall"], grid=(2, 2), rounds=1)
    with pytest.raises(ValueError, match="images must be"):
        Runner.of(model).run(torch.rand(3, 1, 16, 16))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())


def test_a_model_without_values_is_refused_by_name(model: nn.Module) -> None:
    model.to("meta")
    told = r"^the parameters of ReferenceModel are on the meta device, .*: load its weights"
    with pytest.raises(Spark3rError, match=told):
        reconstruct(model, Clip("noise", make_images(3, 16, 16)))
    with pytest.raises(Spark3rError, match=told):
        bench(model, [2], ["dense"], grid=(2, 2))
    spark3r.apply(model, REDUCED).remove()  # a schedule may come before the weights


def test_the_device_of_an_offloaded_model_is_where_its_hooks_compute(model: nn.Module) -> None:
    class Hook:
        def __init__(self, device: object = None, *hooks: Hook) -> None:
            self.execution_device = device
            if hooks:
                self.hooks = hooks

    model.to("meta")
    assert device_of(model) == torch.device("meta")
    model._hf_hook = Hook()  # type: ignore[assignment]
    model.camera_head._hf_hook = Hook(None, Hook(), Hook("cuda:1"))  # type: ignore[union-attr,assignment]
    assert device_of(model) == torch.device("cuda:1")
    model.depth_head.to_empty(device="cpu")  # type: ignore[operator,union-attr]
    assert device_of(model) == CPU


def test_an_offloaded_model_is_reconstructed(model: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    clip = Clip("noise", make_images(3, 16, 16))
    expected = reconstruct(model, clip).run.prediction.depth
    accelerate.cpu_offload(model, CPU)
    assert torch.equal(reconstruct(model, clip).run.prediction.depth, expected)


@pytest.mark.slow
def test_a_schedule_moves_with_its_model(model: nn.Module) -> None:
    spark3r.apply(model, REDUCED)
    images = make_images(6)
    with torch.no_grad():
        model(images)
        output = model.to("meta")(images.to("meta"))  # a tensor left behind would be an error
    assert {value.device.type for value in output.values()} == {"meta"}


def test_positions_that_a_move_left_behind_are_named_before_the_first_pass() -> None:
    model = stand_ins.Vggt().eval()
    clip = Clip("noise", torch.rand(3, 3, 28, 42))
    reconstruct(model, clip)
    known = model.aggregator.position_getter.position_cache
    known[2, 3] = known[2, 3].to("meta")
    with pytest.raises(LayoutError, match=r"moved to cpu, .* positions on meta .*clear them with"):
        reconstruct(model, clip)


def test_the_first_pass_says_that_it_was_measured_in_another_precision(model: nn.Module) -> None:
    images = make_images(6)
    told = "measured in bfloat16, this pass runs in float32"
    runner = Runner.of(model)
    Handle(runner, REDUCED, dtypes=frozenset({"bfloat16"})).install()
    replace(runner, dtype=BF16).run(images[:5])  # warnings are errors here
    with pytest.warns(Spark3rWarning, match=told):
        runner.run(images)
    runner.run(images[:4])  # the warning comes once


def test_a_prediction_needs_a_family_that_reads_outputs(model: nn.Module) -> None:
    ran: list[object] = []
    model.register_forward_pre_hook(lambda *call: ran.append(call))
    family = generic("aggregator.global_blocks.*.attn", patch_size=8)
    with pytest.raises(FamilyError, match="cannot read the model's output"):
        Runner.of(model, family).predict(Clip("toy", torch.rand(2, 3, 16, 16)))
    assert not ran


def test_a_prediction_of_a_clip(model: nn.Module) -> None:
    prediction = Runner.of(model).predict(Clip("noise", torch.rand(3, 3, 16, 24)))
    assert prediction.depth.shape == (3, 16, 24)
    assert prediction.depth.device.type == "cpu"


def test_the_layout_and_the_first_attention_call_of_a_pass(model: nn.Module) -> None:
    images = torch.rand(3, 3, 16, 24)
    runner = Runner.of(model)
    layout = runner.layout(images)
    assert layout == TokenLayout(3, 2, 3, special=5, anchor_frame=0)
    module, args, kwargs, lowered = runner.first_attention_call(images)
    assert module is model.aggregator.global_blocks[0].attn  # type: ignore[union-attr,index]
    assert args[0].shape == (1, layout.tokens, 128)
    assert kwargs == {}
    assert lowered == torch.float32
    assert not model.aggregator._forward_pre_hooks  # type: ignore[union-attr]
    with spark3r.apply(model, Schedule.uniform(runner.depth, 1, 2)):
        assert runner.layout(images) == layout
        assert runner.run(images)["depth"].shape == (1, 3, 16, 24, 1)


def test_a_runner_recognises_a_model_or_takes_a_family_by_its_name(model: nn.Module) -> None:
    runner = Runner.of(model)
    assert runner.family is FAMILIES["reference"]
    assert Runner.of(model, "reference").family is runner.family
    assert list(runner.attention) == [f"aggregator.global_blocks.{i}.attn" for i in range(2)]
    assert runner.depth == 2
    assert runner.device == CPU
    with pytest.raises(FamilyError, match="no family is named 'referenc', expected one of: ref"):
        Runner.of(model, "referenc")


@pytest.mark.slow
def test_a_compiled_model_runs_compiled() -> None:
    torch._dynamo.reset()
    model = make_model(pairs=1)
    compiled = torch.compile(model, backend="eager")
    runner = Runner.of(compiled)
    assert runner.root is model
    assert runner.model is compiled
    images = make_images(2, 16, 16)
    assert torch.equal(runner.run(images)["depth"], Runner.of(model).run(images)["depth"])
