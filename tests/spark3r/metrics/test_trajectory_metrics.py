from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from known_geometry import exactly, from_centres, random_cameras, random_similarity, seeds
from torch import Tensor

from spark3r.geometry import camera_centres, invert_pose
from spark3r.metrics import pose_metrics, scale_drift, trajectory_metrics, umeyama


@pytest.fixture(scope="module")
def evo() -> Any:
    """Return evo's metrics, without its warnings and those of its imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("evo")
        from evo.core import geometry, metrics, trajectory

    class Evo:
        umeyama_alignment = staticmethod(geometry.umeyama_alignment)

        @staticmethod
        def path(extrinsics: Tensor) -> Any:
            poses = invert_pose(extrinsics)
            bottom = poses.new_tensor([0, 0, 0, 1]).expand(len(poses), 1, 4)
            matrices = torch.cat((poses, bottom), dim=1).numpy()
            return trajectory.PosePath3D(poses_se3=list(matrices))

        @staticmethod
        def rmse(metric: str, relation: str, pair: tuple[Any, Any]) -> float:
            how = getattr(metrics.PoseRelation, relation)
            if metric == "ape":
                figure = metrics.APE(how)
            else:
                figure = metrics.RPE(how, delta=1, delta_unit=metrics.Unit.frames, all_pairs=False)
            figure.process_data(pair)
            return float(figure.get_statistic(metrics.StatisticsType.rmse))

        @staticmethod
        def mean_rotation(pair: tuple[Any, Any]) -> float:
            figure = metrics.APE(metrics.PoseRelation.rotation_angle_deg)
            figure.process_data(pair)
            return float(figure.get_statistic(metrics.StatisticsType.mean))

    return Evo


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.02, 1.0])
def test_trajectory_matches_evo(evo: Any, seed: int, noise: float) -> None:
    target = random_cameras(seed, frames=30)
    disturbed = torch.cat(
        (
            random_cameras(seed + 100, frames=30, turn=noise)[..., :3] @ target[..., :3],
            target[..., 3:] + noise * random_cameras(seed + 200, frames=30)[..., 3:],
        ),
        dim=-1,
    )
    predicted = random_similarity(seed).apply_to_extrinsics(disturbed)

    reference, estimate = evo.path(target), evo.path(predicted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, _, scale = estimate.align(reference, correct_scale=True)
        pair = (reference, estimate)
        expected = {
            "ate": evo.rmse("ape", "translation_part", pair),
            "rotation_deg": evo.mean_rotation(pair),
            "rpe_translation": evo.rmse("rpe", "translation_part", pair),
            "rpe_rotation_deg": evo.rmse("rpe", "rotation_angle_deg", pair),
            "scale": scale,
        }
    metrics = trajectory_metrics(predicted, target)
    assert {name: getattr(metrics, name) for name in expected} == pytest.approx(expected, rel=1e-6)
    assert metrics.degenerate is None


def test_umeyama_matches_evo_on_a_mirror_image(evo: Any) -> None:
    # Reflected points have their best orthogonal map outside SO(3): the sign in S matters.
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    target = source * source.new_tensor([1, 1, -1]) + 3
    rotation, translation, scale = evo.umeyama_alignment(
        source.T.numpy(), target.T.numpy(), with_scale=True
    )
    found = umeyama(source, target)
    assert torch.linalg.det(found.rotation).item() == pytest.approx(1)
    np.testing.assert_allclose(found.rotation.numpy(), rotation, atol=1e-9)
    np.testing.assert_allclose(found.translation.numpy(), translation, atol=1e-9)
    assert found.scale.item() == pytest.approx(scale)


@exactly
@given(seeds)
def test_umeyama_recovers_a_similarity(seed: int) -> None:
    truth = random_similarity(seed)
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(2, 10, 3, generator=generator, dtype=torch.float64)
    found = umeyama(source, truth.apply(source))
    torch.testing.assert_close(found.scale, truth.scale.expand(2))
    torch.testing.assert_close(found.rotation, truth.rotation.expand(2, 3, 3))
    torch.testing.assert_close(found.translation, truth.translation.expand(2, 3))


@exactly
@given(seeds, st.sampled_from([1, 2, 3, 8]))
def test_trajectory_metrics_ignore_a_similarity(seed: int, frames: int) -> None:
    target, predicted = random_cameras(seed, frames), random_cameras(seed + 20_000, frames)
    similarity = random_similarity(seed)
    before = trajectory_metrics(predicted, target)
    after = trajectory_metrics(similarity.apply_to_extrinsics(predicted), target)
    for name in ("ate", "rotation_deg", "rpe_translation", "rpe_rotation_deg", "scale_drift"):
        left, right = getattr(before, name), getattr(after, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left == pytest.approx(right, rel=1e-5, abs=1e-5), name
    perfect = trajectory_metrics(similarity.apply_to_extrinsics(target), target)
    assert perfect.ate < 1e-9
    assert perfect.rotation_deg < 1e-5
    assert perfect.rpe_translation < 1e-9
    assert perfect.rpe_rotation_deg < 1e-5
    if frames > 1:
        assert perfect.scale == pytest.approx(1 / similarity.scale.item())
    if frames > 2:
        assert perfect.scale_drift == pytest.approx(0, abs=1e-6)


def test_one_frame() -> None:
    metrics = trajectory_metrics(random_cameras(1, frames=1), random_cameras(2, frames=1))
    assert metrics.degenerate == "one frame"
    assert metrics.ate == pytest.approx(0, abs=1e-12)
    assert (metrics.rpe_translation, metrics.rpe_rotation_deg) == (0, 0)
    assert metrics.rotation_deg == pytest.approx(0, abs=1e-9)
    assert (metrics.scale, metrics.scale_drift) == (1, None)


def test_collapsed_prediction_has_the_error_of_a_point() -> None:
    target, still = random_cameras(1), random_cameras(1, move=0.0)
    metrics = trajectory_metrics(still, target)
    assert metrics.degenerate == "the predicted cameras do not move"
    assert metrics.scale == 1
    assert metrics.ate == pytest.approx(metrics.extent)
    assert metrics.rotation_deg == pytest.approx(0, abs=1e-9)
    assert metrics.scale_drift is None


def test_tripod_keeps_the_predictions_own_scale() -> None:
    moving, still = random_cameras(1), random_cameras(1, move=0.0)
    metrics = trajectory_metrics(moving, still)
    assert metrics.degenerate == "the target's cameras do not move"
    assert metrics.ate == pytest.approx(trajectory_metrics(moving, moving).extent)
    assert metrics.extent == pytest.approx(0, abs=1e-12)
    both = trajectory_metrics(still, still)
    assert both.degenerate == "the target's and predicted cameras do not move"
    assert both.ate == pytest.approx(0, abs=1e-12)


@exactly
@given(seeds)
def test_collinear_cameras_take_their_roll_from_the_orientations(seed: int) -> None:
    rotations = random_cameras(seed)[..., :3]
    along = torch.linspace(0, 3, 8, dtype=torch.float64)[:, None]
    target = from_centres(rotations, along * along.new_tensor([0.3, -0.5, 0.8]))
    similarity = random_similarity(seed)
    metrics = trajectory_metrics(similarity.apply_to_extrinsics(target), target)
    assert metrics.degenerate is not None
    assert "on a line" in metrics.degenerate
    assert metrics.ate < 1e-6
    assert metrics.rotation_deg < 1e-5
    assert metrics.scale == pytest.approx(1 / similarity.scale.item(), rel=1e-6)


def test_a_line_in_one_trajectory_only() -> None:
    target = random_cameras(1)
    along = torch.linspace(0, 3, 8, dtype=torch.float64)[:, None]
    straight = from_centres(target[..., :3], along * along.new_tensor([1, 0, 0]))
    metrics = trajectory_metrics(straight, target)
    assert metrics.degenerate is not None
    assert metrics.degenerate.startswith("the predicted cameras lie on a line")
    best = umeyama(camera_centres(straight), camera_centres(target))
    residual = best.apply(camera_centres(straight)) - camera_centres(target)
    assert metrics.ate == pytest.approx(float(residual.square().sum(-1).mean().sqrt()), rel=1e-6)


def test_scale_drift_by_hand() -> None:
    # The same square walked twice; in the prediction the second round has 1.5 times the size.
    square = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]]).double()
    centres = torch.cat((square, square[1:]))
    grown = torch.cat((square, 1.5 * square[1:]))
    rotations = torch.eye(3, dtype=torch.float64).expand(9, 3, 3)
    target, predicted = from_centres(rotations, centres), from_centres(rotations, grown)
    assert scale_drift(predicted, target) == pytest.approx(math.log(1.5))
    assert scale_drift(target, target) == pytest.approx(0, abs=1e-12)
    assert scale_drift(predicted[:2], target[:2]) is None
    stopped = torch.cat((square, torch.zeros(4, 3).double()))
    assert scale_drift(from_centres(rotations, stopped), target) is None


@pytest.mark.slow
def test_a_thousand_frames() -> None:
    predicted, target = random_cameras(0, frames=1000), random_cameras(1, frames=1000)
    metrics = pose_metrics(predicted, target)
    assert metrics.pairs == 499_500
    assert trajectory_metrics(predicted, target).degenerate is None
