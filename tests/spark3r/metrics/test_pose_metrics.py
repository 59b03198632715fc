from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from known_geometry import (
    exactly,
    from_centres,
    random_cameras,
    random_similarity,
    rotation_about_z,
    seeds,
)
from torch import Tensor

from spark3r.geometry import quaternion_to_matrix
from spark3r.metrics import (
    align_trajectories,
    direction_angle_deg,
    frame_pairs,
    pose_auc,
    pose_metrics,
    relative_pose_errors,
    rotation_angle_deg,
    trajectory_metrics,
)


@pytest.mark.parametrize("angle", [0.0, 1e-7, 1.0, 90.0, 179.999999, 180.0])
def test_rotation_angle_is_accurate_at_both_ends(angle: float) -> None:
    turned = rotation_about_z(angle) @ rotation_about_z(33)
    found = rotation_angle_deg(turned, rotation_about_z(33))
    assert found.item() == pytest.approx(angle, rel=1e-6, abs=1e-12)


def test_direction_angle() -> None:
    x = torch.tensor([1.0, 0, 0])
    others = torch.tensor([[2.0, 0, 0], [0, 3, 0], [-1, 0, 0], [1, 1, 0], [0, 0, 0]])
    expected = torch.tensor([0.0, 90, 180, 45, 90], dtype=torch.float64)
    torch.testing.assert_close(direction_angle_deg(x, others), expected)
    tiny = torch.tensor([1.0, 1e-7, 0], dtype=torch.float64)
    assert direction_angle_deg(x, tiny).item() == pytest.approx(math.degrees(1e-7), rel=1e-6)


def test_relative_errors_by_hand() -> None:
    # The target's three cameras stand at 0, x and y, unrotated. In the prediction camera 1 is
    # turned by 10 degrees, and camera 2 stands at -y.
    eye = torch.eye(3, dtype=torch.float64)
    target = from_centres(
        eye.expand(3, 3, 3), torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0]]).double()
    )
    predicted = from_centres(
        torch.stack((eye, rotation_about_z(10), eye)),
        torch.tensor([[0, 0, 0], [1, 0, 0], [0, -1, 0]]).double(),
    )
    errors = relative_pose_errors(predicted, target)
    assert [pair.tolist() for pair in frame_pairs(3)] == [[0, 0, 1], [1, 2, 2]]
    torch.testing.assert_close(errors.rotation_deg, torch.tensor([10.0, 0, 10]).double())
    # Pair (1, 2), seen from camera 1: target (-1, 1), predicted (-1, -1) turned by +10 degrees.
    torch.testing.assert_close(errors.translation_deg, torch.tensor([0.0, 180, 100]).double())
    torch.testing.assert_close(errors.translation_axis_deg, torch.tensor([0.0, 0, 80]).double())
    metrics = pose_metrics(predicted, target)
    assert metrics.rotation_deg == pytest.approx(10)
    assert metrics.rotation_mean_deg == pytest.approx(20 / 3)
    assert metrics.translation_deg == pytest.approx(100)
    # max(rotation, axis): 10, 0, 80 degrees. 10 may round to either side of its bin's edge.
    assert metrics.auc_3 == pytest.approx(1 / 3)
    assert metrics.auc_30 == pytest.approx((30 + 20) / 90, abs=1 / 90 + 1e-9)


def naive_pair_errors(predicted: Tensor, target: Tensor) -> tuple[list[float], list[float]]:
    """Return the errors by definition, one pair at a time, by 4×4 matrices and arc cosines."""

    def square(pose: Tensor) -> Tensor:
        return torch.cat((pose, pose.new_tensor([[0, 0, 0, 1]])))

    rotations, translations = [], []
    for i in range(len(predicted)):
        for j in range(i + 1, len(predicted)):
            p = square(predicted[i]) @ torch.linalg.inv(square(predicted[j]))
            t = square(target[i]) @ torch.linalg.inv(square(target[j]))
            cosine = (torch.trace(p[:3, :3].T @ t[:3, :3]) - 1) / 2
            rotations.append(math.degrees(math.acos(cosine.clamp(-1, 1))))
            dot = p[:3, 3] @ t[:3, 3] / (p[:3, 3].norm() * t[:3, 3].norm())
            translations.append(math.degrees(math.acos(dot.clamp(-1, 1))))
    return rotations, translations


@exactly
@given(seeds)
def test_relative_errors_match_the_definition(seed: int) -> None:
    predicted = random_cameras(seed, turn=1.0)
    target = random_cameras(seed + 20_000, turn=1.0)
    rotations, translations = naive_pair_errors(predicted, target)
    errors = relative_pose_errors(predicted, target)
    np.testing.assert_allclose(errors.rotation_deg.numpy(), rotations, atol=1e-5)
    np.testing.assert_allclose(errors.translation_deg.numpy(), translations, atol=1e-5)
    assert errors.has_baseline.all()


@exactly
@given(seeds)
def test_relative_errors_ignore_a_similarity(seed: int) -> None:
    predicted, target = random_cameras(seed), random_cameras(seed + 20_000)
    moved = random_similarity(seed).apply_to_extrinsics(predicted)
    before, after = relative_pose_errors(predicted, target), relative_pose_errors(moved, target)
    torch.testing.assert_close(after.rotation_deg, before.rotation_deg, atol=1e-6, rtol=0)
    torch.testing.assert_close(after.translation_deg, before.translation_deg, atol=1e-6, rtol=0)
    same = pose_metrics(moved, predicted)
    assert same.rotation_deg < 1e-6
    assert same.translation_deg < 1e-6
    assert same.auc_3 == 1


def test_relative_errors_take_batches() -> None:
    predicted = torch.stack([random_cameras(seed) for seed in (1, 2, 3)])
    target = torch.stack([random_cameras(seed) for seed in (4, 5, 6)])
    errors = relative_pose_errors(predicted, target)
    assert errors.rotation_deg.shape == (3, 28)
    one = relative_pose_errors(predicted[1], target[1])
    torch.testing.assert_close(errors.translation_deg[1], one.translation_deg)
    aucs = pose_auc(errors.rotation_deg, errors.translation_axis_deg, 30)
    expected = pose_auc(one.rotation_deg, one.translation_axis_deg, 30)
    torch.testing.assert_close(aucs[1], expected)


def histogram_auc(worst: np.ndarray[Any, np.dtype[np.float64]], threshold: int) -> float:
    """Return the AUC in the form of VGGT's evaluation: histogram, cumulative sum, mean."""
    counts, _ = np.histogram(worst, bins=np.arange(threshold + 1))
    return float(np.mean(np.cumsum(counts.astype(float) / len(worst))))


@pytest.mark.parametrize("threshold", [1, 3, 5, 15, 30])
def test_auc_matches_the_histogram(threshold: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rotation = 40 * torch.rand(500, generator=generator, dtype=torch.float64)
    translation = 40 * torch.rand(500, generator=generator, dtype=torch.float64)
    # Whole degrees sit on bin edges, the threshold itself among them.
    rotation[:90] = torch.arange(90).double() % 45
    translation[:50] = 0
    expected = histogram_auc(torch.maximum(rotation, translation).numpy(), threshold)
    assert pose_auc(rotation, translation, threshold).item() == pytest.approx(expected)


def test_auc_by_hand() -> None:
    # Errors 0.5, 1.5, 3 and 3.5 degrees, threshold 3. Recall below 1, 2 and 3 degrees: 1/4, 2/4,
    # 3/4, the last because the histogram's last bin includes its right edge. Mean 1/2.
    rotation = torch.tensor([0.5, 1.0, 3.0, 3.5])
    translation = torch.tensor([0.1, 1.5, 0.0, 0.0])
    assert pose_auc(rotation, translation, 3).item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no pairs"):
        pose_auc(torch.zeros(0), torch.zeros(0), 3)
    with pytest.raises(ValueError, match="threshold"):
        pose_auc(rotation, translation, 0)


def test_chance_level_of_the_translation_direction_is_90_degrees() -> None:
    metrics = pose_metrics(
        random_cameras(1, frames=200, turn=2.0), random_cameras(2, frames=200, turn=2.0)
    )
    assert metrics.translation_deg == pytest.approx(90, abs=3)


def test_poses_of_one_frame_and_of_a_tripod() -> None:
    one = pose_metrics(random_cameras(1, frames=1), random_cameras(2, frames=1))
    assert one.degenerate is not None
    assert "one frame" in one.degenerate
    assert (one.rotation_deg, one.translation_deg, one.auc_30, one.pairs) == (0, 0, 1, 0)

    moving, still = random_cameras(1), random_cameras(1, move=0.0)
    tripod = pose_metrics(moving, still)
    assert tripod.degenerate is not None
    assert "do not move" in tripod.degenerate
    assert tripod.pairs_with_baseline == 0
    assert (tripod.translation_deg, tripod.auc_30) == (0, 1)

    stuck = pose_metrics(still, moving)  # a collapsed prediction is no better than chance
    assert stuck.degenerate is None
    assert (stuck.translation_deg, stuck.auc_30) == (90, 0)


def test_float32_noise_is_no_baseline() -> None:
    # A tripod far from the origin: the centres computed from float32 extrinsics differ by noise.
    quaternion = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    target = from_centres(
        quaternion_to_matrix(quaternion), torch.tensor([3.0, -7, 5]).expand(20, 3)
    )
    assert not relative_pose_errors(target, target).has_baseline.any()
    assert align_trajectories(target, target).degenerate is not None


def test_pose_errors() -> None:
    good = random_cameras(0)
    bad = good.clone()
    bad[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="predicted: 1 of 96 values"):
        pose_metrics(bad, good)
    with pytest.raises(ValueError, match="target: 1 of 96 values"):
        trajectory_metrics(good, bad)
    with pytest.raises(ValueError, match="expected shape"):
        pose_metrics(good, good[:3])
    with pytest.raises(ValueError, match=r"expected \[S, 3, 4\]"):
        pose_metrics(good[None], good[None])
