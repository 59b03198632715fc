from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from known_geometry import exactly, pinhole, random_cameras, random_similarity, room_depth, seeds

from spark3r.geometry import unproject
from spark3r.metrics import (
    Similarity,
    align_trajectories,
    nearest_distances,
    point_deviation,
    point_metrics,
    scene_size,
)
from spark3r.metrics.points import sample_evenly


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
