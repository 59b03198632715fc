from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from known_geometry import exactly, pinhole, random_cameras, random_similarity, room_depth, seeds

from spark3r.geometry import camera_centres, unproject
from spark3r.metrics import collapsed, consistency_metrics, key_frame_indices


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
    # In a dense run from a tripod the cameras do not move, so their spreads guard nothing.
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
    # Compared with a run whose frames see the same place, this one counts as collapsed.
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
