"""A patched model in other precisions, with gradients, and without memory."""

from __future__ import annotations

import pytest
import torch
from patched import FAITHFUL, depth
from small_models import make_images, make_model

import spark3r


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

    def total() -> torch.Tensor:  # the heads' outputs are float32, whatever the model
        return model.aggregator(images[None])[0][-1][..., 0].sum()

    total().backward()
    analytic = float((weight.grad * direction).sum())
    step = 1e-6
    with torch.no_grad():
        weight += step * direction
        above = total()
        weight -= 2 * step * direction
        below = total()
    assert float(above - below) / (2 * step) == pytest.approx(analytic, rel=1e-6)


def test_the_patched_model_runs_on_the_meta_device(model):
    spark3r.apply(model, FAITHFUL)
    output = model.to("meta")(torch.empty(6, 3, 24, 16, device="meta"))
    assert output["depth"].shape == (1, 6, 24, 16, 1)
