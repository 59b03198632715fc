"""The precision of a pass: what it is, who tells it, and what is said where it does not run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from patched import REDUCED
from small_models import make_images
from torch import nn

from spark3r import Clip, Spark3rError, Spark3rWarning
from spark3r.families.registry import detect
from spark3r.patching.handle import Handle
from spark3r.reconstruction import reconstruct
from spark3r.runner import autocast, first_attention_call, precision_of, predict, product_dtype, run

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
    assert precision_of(model.to(parameters), images, dtype=asked) == expected
    assert product_dtype(F32, CPU) == F32


def test_none_leaves_autocast_as_it_is_and_float32_turns_it_off(model: nn.Module) -> None:
    images = make_images(2, 16, 16)
    with torch.autocast("cpu", BF16):
        assert precision_of(model, images) == BF16
        assert precision_of(model, images, dtype=F32) == F32
        with autocast(CPU, F32):
            assert product_dtype(F32, CPU) == F32


def test_a_model_may_turn_autocast_on_by_itself(lowering: nn.Module) -> None:
    images = make_images(3, 16, 16)
    assert precision_of(lowering, images, dtype=F32) == BF16
    assert first_attention_call(lowering, images, dtype=F32).autocast == BF16
    assert reconstruct(lowering, Clip("noise", images)).dtype == BF16


def test_a_pass_is_lowered_and_its_prediction_is_not(model: nn.Module) -> None:
    seen: list[torch.dtype] = []
    projection = model.aggregator.global_blocks[0].attn.qkv  # type: ignore[union-attr,index]
    projection.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    clip = Clip("noise", make_images(3, 16, 16))
    prediction = predict(model, clip, dtype=BF16)
    assert seen == [BF16]
    assert prediction.depth.dtype == prediction.extrinsics.dtype == F32
    with torch.inference_mode(), torch.autocast("cpu", BF16):
        expected = model(clip.images)
    assert torch.equal(run(model, clip.images, dtype=BF16)["depth"], expected["depth"])
    assert {parameter.dtype for parameter in model.parameters()} == {F32}


def test_what_does_not_run_in_half_precision_says_so(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(2, 16, 16)

    def unsupported(*args: object) -> None:
        raise RuntimeError("not implemented for 'Half'\nat some place")

    monkeypatch.setattr(model, "forward", unsupported)
    with pytest.raises(
        Spark3rError, match=r"^the model .* run in float16 on cpu \(not [^\n]*\): use"
    ):
        run(model, images, dtype=F16)
    with pytest.raises(RuntimeError, match="not implemented"):
        run(model, images)
    with pytest.raises(
        Spark3rError, match=r"^the model .* parameters cast to bfloat16 \(not [^\n]*\): leave them"
    ):
        reconstruct(model.to(BF16), Clip("noise", images))


def test_the_first_pass_says_that_it_was_measured_in_another_precision(model: nn.Module) -> None:
    images = make_images(6)
    told = "measured in bfloat16, this pass runs in float32"
    Handle(model, detect(model), REDUCED, dtypes=frozenset({"bfloat16"})).install()
    run(model, images[:5], dtype=BF16)  # warnings are errors here
    with pytest.warns(Spark3rWarning, match=told):
        run(model, images)
    run(model, images[:4])  # told once
