from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spark3r.metrics import (
    Similarity,
    align_trajectories,
    camera_centres,
    collapsed,
    consistency_metrics,
    depth_metrics,
    direction_angle_deg,
    frame_pairs,
    invert_pose,
    key_frame_indices,
    log_depth_deviation,
    median_scale,
    nearest_distances,
    point_deviation,
    point_metrics,
    pose_auc,
    pose_metrics,
    project,
    relative_pose_errors,
    rotation_angle_deg,
    scale_drift,
    scene_size,
    trajectory_metrics,
    umeyama,
    unproject,
)
from spark3r.metrics.points import sample_evenly
from spark3r.pose_encoding import quaternion_to_matrix

exactly = settings(deadline=None, derandomize=True, max_examples=30)
seeds = st.integers(0, 10_000)


# --- scenes and trajectories whose geometry is known in closed form -------------------------------


def random_cameras(seed: int, frames: int = 8, turn: float = 0.15, move: float = 0.5) -> Tensor:
    """World-to-camera extrinsics ``[S, 3, 4]`` float64, looking roughly along +z."""
    generator = torch.Generator().manual_seed(seed)
    quaternion = turn * torch.randn(frames, 4, generator=generator, dtype=torch.float64)
    quaternion[:, 3] = 1
    centres = move * torch.randn(frames, 3, generator=generator, dtype=torch.float64)
    return from_centres(quaternion_to_matrix(quaternion), centres)


def from_centres(world_to_camera: Tensor, centres: Tensor) -> Tensor:
    return torch.cat((world_to_camera, -(world_to_camera @ centres[..., None])), dim=-1)


def random_similarity(seed: int) -> Similarity:
    generator = torch.Generator().manual_seed(seed + 1_000_000)
    scale = torch.rand((), generator=generator, dtype=torch.float64) * 9.9 + 0.1
    quaternion = torch.randn(4, generator=generator, dtype=torch.float64)
    shift = 5 * torch.randn(3, generator=generator, dtype=torch.float64)
    return Similarity(scale, quaternion_to_matrix(quaternion), shift)


def pinhole(height: int = 48, width: int = 64, frames: int = 8) -> Tensor:
    focal = 0.8 * width
    matrix = [[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]
    return torch.tensor(matrix, dtype=torch.float64).repeat(frames, 1, 1)


def room_depth(extrinsics: Tensor, intrinsics: Tensor, height: int = 48, width: int = 64) -> Tensor:
    """Exact z-depth of a box-shaped room, 8 m wide and high, from -4 to 5 m, with a ball in it."""
    ones = torch.ones(len(extrinsics), height, width, dtype=torch.float64)
    origin = camera_centres(extrinsics)[:, None, None]
    ray = unproject(ones, intrinsics, extrinsics) - origin  # z-depth 1, so t is the depth
    low, high = ray.new_tensor([-4, -4, -4]), ray.new_tensor([4, 4, 5])
    wall = torch.where(ray > 0, (high - origin) / ray, (low - origin) / ray).amin(dim=-1)
    from_ball = origin - ray.new_tensor([0.3, 0.2, 3.0])
    a, b = ray.square().sum(-1), (ray * from_ball).sum(-1)
    discriminant = b * b - a * (from_ball.square().sum(-1) - 0.5**2)
    ball = (-b - discriminant.clamp(min=0).sqrt()) / a
    return torch.where((discriminant > 0) & (ball > 0), torch.minimum(ball, wall), wall)


def rotation_about_z(degrees: float) -> Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)


# --- geometry -------------------------------------------------------------------------------------


@exactly
@given(seeds)
def test_project_undoes_unproject(seed: int) -> None:
    extrinsics, intrinsics = random_cameras(seed), pinhole(12, 16)
    depth = 1 + 5 * torch.rand(8, 12, 16, dtype=torch.float64)
    points = unproject(depth, intrinsics, extrinsics)
    uv, z = project(points.flatten(1, 2), intrinsics, extrinsics)
    torch.testing.assert_close(z.view_as(depth), depth)
    v, u = torch.meshgrid(torch.arange(12) + 0.5, torch.arange(16) + 0.5, indexing="ij")
    expected = torch.stack((u, v), dim=-1).double().expand(8, 12, 16, 2)
    torch.testing.assert_close(uv.view(8, 12, 16, 2), expected, atol=1e-9, rtol=0)


def test_unproject_by_hand() -> None:
    # Camera at (0, 0, -1), focal length 2, principal point in the middle of a 2×2 image.
    extrinsics = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]])
    intrinsics = torch.tensor([[2.0, 0, 1], [0, 2, 1], [0, 0, 1]])
    points = unproject(torch.full((2, 2), 4.0), intrinsics, extrinsics)
    assert points[0, 1].tolist() == [1, -1, 3]  # row 0, column 1: pixel centre (1.5, 0.5)
    corner = unproject(torch.full((2, 2), 4.0), intrinsics, extrinsics, pixel_centre=0.0)
    assert corner[0, 1].tolist() == [0, -2, 3]
    assert points.dtype == torch.float32


def test_unproject_takes_batches_and_gradients() -> None:
    extrinsics, intrinsics = random_cameras(0, frames=6), pinhole(frames=6)
    depth = torch.rand(6, 4, 5, dtype=torch.float64, requires_grad=True)
    flat = unproject(depth, intrinsics, extrinsics)
    nested = unproject(
        depth.view(2, 3, 4, 5), intrinsics.view(2, 3, 3, 3), extrinsics.view(2, 3, 3, 4)
    )
    torch.testing.assert_close(nested.flatten(0, 1), flat)
    flat.sum().backward()
    assert depth.grad is not None


def test_inverse_pose() -> None:
    extrinsics = random_cameras(3)
    torch.testing.assert_close(invert_pose(invert_pose(extrinsics)), extrinsics)
    with pytest.raises(ValueError, match=r"pose: expected \[\.\.\., 3, 4\], found \[4, 4\]"):
        invert_pose(torch.eye(4))


# --- depth ----------------------------------------------------------------------------------------


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
    predicted[1] = math.nan  # never looked at
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


# --- relative pose --------------------------------------------------------------------------------


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
    """The definition, one pair at a time, by 4×4 matrices and arc cosines."""

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
    """What VGGT's evaluation computes, in its own words: histogram, cumulative sum, mean."""
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


# --- trajectories ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evo() -> Any:
    """evo's metrics. Its own warnings, and those of what it imports, are not ours."""
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


# --- points ---------------------------------------------------------------------------------------


def test_points_by_hand() -> None:
    target = torch.tensor([[0.0, 0, 0], [2, 0, 0], [4, 0, 0]])
    predicted = torch.tensor([[0.0, 1, 0], [2, 0, 0]])
    size = 2 * math.sqrt(8 / 3)  # squared distances from the centroid: 4, 0, 4
    assert scene_size(target) == pytest.approx(size)
    metrics = point_metrics(predicted, target, Similarity.identity())
    assert metrics.scene_size == pytest.approx(size)
    assert metrics.accuracy_mean * size == pytest.approx(0.5, rel=1e-6)  # 1, 0
    assert metrics.completeness_mean * size == pytest.approx(1.0, rel=1e-6)  # 1, 0, 2
    assert metrics.completeness_median * size == pytest.approx(1.0, rel=1e-6)


def test_nearest_distances_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, 3, generator=generator) for n in (57, 91))
    whole = torch.cdist(first.double(), second.double())
    monkeypatch.setattr("spark3r.metrics.points._CHUNK", 500)
    forward, backward = nearest_distances(first, second)
    torch.testing.assert_close(forward.double(), whole.amin(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(backward.double(), whole.amin(0), atol=1e-6, rtol=0)


@exactly
@given(seeds)
def test_points_are_compared_after_alignment(seed: int) -> None:
    cameras, intrinsics = random_cameras(seed), pinhole(12, 16)
    points = unproject(room_depth(cameras, intrinsics, 12, 16), intrinsics, cameras)
    similarity = random_similarity(seed)
    moved = similarity.apply(points.view(-1, 3)).view_as(points)
    alignment = align_trajectories(similarity.apply_to_extrinsics(cameras), cameras).similarity
    metrics = point_metrics(moved, points, alignment, max_points=500)
    assert metrics.accuracy_mean < 1e-6
    assert metrics.completeness_mean < 1e-6
    assert point_deviation(moved, points, alignment) < 1e-6
    assert point_deviation(moved, points, Similarity.identity()) > 0.01


def test_missing_part_costs_completeness_only() -> None:
    points = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    half = points[points[:, 0] < 0.5]
    metrics = point_metrics(half, points, Similarity.identity())
    assert metrics.accuracy_mean == 0
    assert metrics.completeness_mean > 0.05


def test_even_sample() -> None:
    points = torch.arange(64 * 64 * 4)[:, None].expand(-1, 3)
    sample = sample_evenly(points, 1024)
    assert len(sample) == 1024
    assert (sample[:, 0].diff() > 0).all()
    assert len((sample[:, 0] % 64).unique()) == 64  # no image column is left out
    assert torch.equal(sample_evenly(points, 10**6), points)


def test_points_errors() -> None:
    points = torch.rand(5, 3)
    none = torch.zeros(5, dtype=torch.bool)
    identity = Similarity.identity()
    with pytest.raises(ValueError, match="predicted: no valid point"):
        point_metrics(points, points, identity, valid_predicted=none)
    with pytest.raises(ValueError, match="coincide"):
        point_metrics(points, torch.ones(5, 3), identity)
    with pytest.raises(ValueError, match="predicted: 3 of 15"):
        point_metrics(points.index_fill(0, torch.tensor([0]), math.nan), points, identity)
    with pytest.raises(ValueError, match="mask of shape"):
        point_deviation(points, points, identity, torch.ones(4, dtype=torch.bool))


# --- consistency ----------------------------------------------------------------------------------


def test_key_frames() -> None:
    assert key_frame_indices(8, 8) == list(range(8))
    assert key_frame_indices(48, 8) == [0, 7, 13, 20, 27, 34, 40, 47]
    assert key_frame_indices(3, 8) == [0, 1, 2]
    assert key_frame_indices(5, 1) == [0]
    with pytest.raises(ValueError, match="at least one"):
        key_frame_indices(0, 8)


@pytest.mark.parametrize("seed", range(3))
def test_true_geometry_is_consistent(seed: int) -> None:
    cameras, intrinsics = random_cameras(seed, turn=0.05, move=0.3), pinhole()
    depth = room_depth(cameras, intrinsics)
    metrics = consistency_metrics(depth, intrinsics, cameras)
    assert metrics.log_ratio is not None
    assert metrics.log_ratio < 1e-3
    assert metrics.visible > 0.5
    assert metrics.pairs == 56
    single = consistency_metrics(depth.float(), intrinsics.float(), cameras.float())
    assert single.log_ratio == pytest.approx(metrics.log_ratio, abs=1e-5)


def test_a_plane_is_exactly_consistent() -> None:
    # Inverse depth is interpolated, which is exact on planes, at any angle.
    cameras, intrinsics = random_cameras(0, turn=0.05, move=0.3), pinhole()
    ones = torch.ones(8, 48, 64, dtype=torch.float64)
    origin = camera_centres(cameras)[:, None, None]
    ray = unproject(ones, intrinsics, cameras) - origin
    normal = ray.new_tensor([0.2, 0.3, 1.0])
    depth = (5 - (origin * normal).sum(-1)) / (ray * normal).sum(-1)
    assert depth.min() > 0
    metrics = consistency_metrics(depth, intrinsics, cameras)
    assert metrics.log_ratio == pytest.approx(0, abs=1e-9)


def test_consistency_by_hand() -> None:
    # Two cameras looking at a wall, the second one metre closer: depths 3 and 2. Predicted depths
    # 3 and 2·e^0.1 disagree by 0.1 from 0 to 1, and by log(3 ÷ (2·e^0.1 + 1)) the other way.
    cameras = torch.eye(3, 4, dtype=torch.float64).repeat(2, 1, 1)
    cameras[1, 2, 3] = -1
    near = 2 * math.exp(0.1)
    depth = torch.tensor([3.0, near]).double()[:, None, None].expand(2, 48, 64)
    metrics = consistency_metrics(depth, pinhole(frames=2), cameras)
    expected = (0.1 + abs(math.log(3 / (near + 1)))) / 2
    assert metrics.log_ratio == pytest.approx(expected, rel=1e-6)
    # From 0 to 1 the picture grows by 3/2: (2/3)² of it, in whole pixels 32·42, stays in view.
    assert metrics.visible == pytest.approx((32 * 42 / (48 * 64) + 1) / 2, abs=0.01)
    assert metrics.pairs == 2
    assert metrics.camera_spread == pytest.approx(0.5 / near)
    assert metrics.rotation_spread_deg == pytest.approx(0, abs=1e-9)
    assert metrics.depth_spread == pytest.approx(0, abs=1e-9)


@exactly
@given(seeds)
def test_consistency_ignores_a_similarity(seed: int) -> None:
    cameras, intrinsics = random_cameras(seed, turn=0.05, move=0.3), pinhole(12, 16)
    generator = torch.Generator().manual_seed(seed)
    noise = 1 + 0.1 * torch.rand(8, 12, 16, generator=generator)
    depth = room_depth(cameras, intrinsics, 12, 16) * noise
    similarity = random_similarity(seed)
    before = consistency_metrics(depth, intrinsics, cameras)
    after = consistency_metrics(
        depth * similarity.scale, intrinsics, similarity.apply_to_extrinsics(cameras)
    )
    for name in ("log_ratio", "visible", "camera_spread", "rotation_spread_deg", "depth_spread"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), rel=1e-6), name


def test_consistency_grows_with_the_error() -> None:
    cameras, intrinsics = random_cameras(0, turn=0.05, move=0.3), pinhole()
    depth = room_depth(cameras, intrinsics)
    values = []
    for noise in (0.0, 0.02, 0.05):
        shift = noise * torch.randn(8, 3, 1, generator=torch.Generator().manual_seed(1)).double()
        found = consistency_metrics(depth, intrinsics, torch.cat(
            (cameras[..., :3], cameras[..., 3:] + shift), dim=-1))  # fmt: skip
        assert found.log_ratio is not None
        values.append(found.log_ratio)
    assert values[0] < values[1] < values[2]


def test_collapse_is_consistent_and_the_guard_catches_it() -> None:
    cameras, intrinsics = random_cameras(0, turn=0.05, move=0.3), pinhole()
    depth = room_depth(cameras, intrinsics)
    wobbly = depth * torch.linspace(0.9, 1.1, 8, dtype=torch.float64)[:, None, None]
    dense = consistency_metrics(wobbly, intrinsics, cameras)
    assert dense.log_ratio is not None
    assert collapsed(dense, dense) == ()

    stuck = cameras[:1].repeat(8, 1, 1)
    same_depth = depth[:1].repeat(8, 1, 1)
    frozen = consistency_metrics(same_depth, intrinsics, stuck)
    assert frozen.log_ratio is not None
    assert frozen.log_ratio < dense.log_ratio
    assert collapsed(frozen, dense) == ("camera_spread", "rotation_spread_deg")

    flat = consistency_metrics(torch.full_like(depth, 4.0), intrinsics, stuck)
    assert flat.log_ratio == pytest.approx(0, abs=1e-9)
    assert collapsed(flat, dense) == ("camera_spread", "rotation_spread_deg", "depth_spread")
    # A dense run from a tripod guards only what it can.
    assert collapsed(flat, frozen) == ("depth_spread",)


def test_frames_that_see_nothing_in_common() -> None:
    intrinsics = pinhole(frames=2)
    away = torch.stack(
        (
            torch.eye(3, 4),
            torch.cat((torch.diag(torch.tensor([-1.0, 1, -1])), torch.zeros(3, 1)), 1),
        )
    ).double()
    metrics = consistency_metrics(torch.ones(2, 48, 64), intrinsics, away)
    assert (metrics.log_ratio, metrics.visible, metrics.pairs) == (None, 0, 0)
    one = consistency_metrics(torch.ones(1, 48, 64), intrinsics[:1], away[:1])
    assert (one.log_ratio, one.visible, one.pairs) == (None, 0, 0)
    # Next to a run that did see something, this one counts as collapsed.
    together = consistency_metrics(torch.ones(2, 48, 64), intrinsics, away[:1].repeat(2, 1, 1))
    assert "visible" in collapsed(metrics, together)


def test_consistency_leaves_out_masked_pixels() -> None:
    cameras, intrinsics = random_cameras(0, turn=0.05, move=0.3), pinhole()
    depth = room_depth(cameras, intrinsics)
    broken, valid = depth.clone(), torch.ones_like(depth, dtype=torch.bool)
    broken[:, :, :32], valid[:, :, :32] = math.nan, False
    metrics = consistency_metrics(broken, intrinsics, cameras, valid)
    assert metrics.log_ratio is not None
    assert metrics.log_ratio < 1e-3
    with pytest.raises(ValueError, match="12288 valid values are not positive"):
        consistency_metrics(broken, intrinsics, cameras)
    with pytest.raises(ValueError, match="no valid pixel"):
        consistency_metrics(broken, intrinsics, cameras, torch.zeros_like(valid))


def test_consistency_of_chosen_frames_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    cameras, intrinsics = random_cameras(0, turn=0.05, move=0.3), pinhole()
    depth = room_depth(cameras, intrinsics) * (1 + 0.1 * torch.rand(8, 48, 64).double())
    whole = consistency_metrics(depth, intrinsics, cameras, key_frames=[1, 4, 6])
    monkeypatch.setattr("spark3r.metrics.consistency._CHUNK", 2 * 48 * 64)
    assert consistency_metrics(depth, intrinsics, cameras, key_frames=[1, 4, 6]) == whole
    assert whole.pairs == 6


def test_consistency_errors() -> None:
    depth, cameras, intrinsics = torch.ones(2, 4, 4), random_cameras(0, 2), pinhole(4, 4, 2)
    with pytest.raises(ValueError, match="extrinsics: expected"):
        consistency_metrics(depth, intrinsics, cameras[:1])
    with pytest.raises(ValueError, match="intrinsics: 18 of 18 values"):
        consistency_metrics(depth, intrinsics * math.nan, cameras)
    with pytest.raises(ValueError, match="valid: expected"):
        consistency_metrics(depth, intrinsics, cameras, torch.ones(2, 4, dtype=torch.bool))


# --- size -----------------------------------------------------------------------------------------


def test_a_thousand_frames() -> None:
    predicted, target = random_cameras(0, frames=1000), random_cameras(1, frames=1000)
    metrics = pose_metrics(predicted, target)
    assert metrics.pairs == 499_500
    assert trajectory_metrics(predicted, target).degenerate is None
