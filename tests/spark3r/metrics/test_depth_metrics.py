from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from known_geometry import exactly, seeds

from spark3r.metrics import depth_metrics, log_depth_deviation, median_scale


def test_depth_by_hand() -> None:
    target = torch.tensor([[[1.0, 2.0], [4.0, 0.0]]])  # 0: no ground truth there
    predicted = torch.tensor([[[1.1, 2.6], [3.0, 7.0]]])
    metrics = depth_metrics(predicted, target)
    assert metrics.pixels == 3
    assert metrics.abs_rel == pytest.approx((0.1 + 0.3 + 0.25) / 3)
    assert metrics.delta_125 == pytest.approx(1 / 3)
    logs = [math.log(1.1), math.log(1.3), -math.log(0.75)]
    assert metrics.log_ratio == pytest.approx(sum(logs) / 3)


def test_depth_alignment_per_clip_and_per_frame() -> None:
    target = torch.rand(2, 5, 5) + 1
    predicted = target * torch.tensor([2.0, 4.0])[:, None, None]
    assert depth_metrics(predicted, target).abs_rel == pytest.approx(2.0)
    assert depth_metrics(predicted, target, align="frame").abs_rel == pytest.approx(0, abs=1e-6)
    scale = median_scale(predicted, target, align="frame")
    torch.testing.assert_close(scale, torch.tensor([0.5, 0.25])[:, None, None])
    # Of 50 ratios, 25 are ½ and 25 are ¼; the lower median is ¼, so frame 0 is off by a half.
    assert depth_metrics(predicted, target, align="clip").abs_rel == pytest.approx(0.25)
    assert median_scale(predicted, target, align="none").item() == 1


def test_depth_mask_and_frame_without_pixels() -> None:
    target, predicted = torch.ones(2, 2, 2), torch.full((2, 2, 2), 2.0)
    predicted[1] = math.nan  # a frame without ground truth
    valid = torch.tensor([True, False])[:, None, None].expand(2, 2, 2)
    metrics = depth_metrics(predicted, target, valid, align="frame")
    assert (metrics.abs_rel, metrics.delta_125, metrics.pixels) == (0, 1, 4)


@exactly
@given(seeds, st.floats(1e-3, 1e3))
def test_deviation_of_depth_ignores_one_scale(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(2, 6, 6, generator=generator) + 0.5
    other = dense * (1 + 0.1 * torch.rand(2, 6, 6, generator=generator))
    expected = log_depth_deviation(other, dense)
    assert log_depth_deviation(other * scale, dense) == pytest.approx(expected, rel=1e-3)
    assert 0 < expected < 0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_bad_predicted_depth_is_an_error(bad: float) -> None:
    predicted = torch.ones(1, 2, 2)
    predicted[0, 0, 0] = bad
    with pytest.raises(ValueError, match="1 of 4 valid pixels"):
        depth_metrics(predicted, torch.ones(1, 2, 2))


def test_depth_errors() -> None:
    ones = torch.ones(1, 2, 2)
    with pytest.raises(ValueError, match="one shape"):
        depth_metrics(ones, torch.ones(1, 2, 3))
    with pytest.raises(ValueError, match="no valid pixel"):
        depth_metrics(ones, torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="valid: expected shape"):
        depth_metrics(ones, ones, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="align"):
        depth_metrics(ones, ones, align="median")  # type: ignore[arg-type]
