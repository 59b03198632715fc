"""Point-cloud metrics: accuracy, completeness, distance of corresponding points.

Accuracy is the distance from predicted points to the nearest target point, completeness is the
distance from target points to the nearest predicted one (as on DTU and 7-Scenes, and in VGGT's and
DUSt3R's tables). Here they are fractions of the scene size, so that scenes of any unit can be
averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import check_finite, check_shape
from .alignment import Similarity

# Distances computed at once: 2**24 float32 are 64 MiB.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class PointMetrics:
    """Nearest-neighbour distances of two point clouds as fractions of the scene size.

    Attributes:
        accuracy_mean: Mean distance from predicted points to the target cloud.
        accuracy_median: Median distance from predicted points to the target cloud.
        completeness_mean: Mean distance from target points to the predicted cloud.
        completeness_median: Median distance from target points to the predicted cloud.
        scene_size: Scene size that the fractions refer to, in the target's unit of length.
    """

    accuracy_mean: float
    accuracy_median: float
    completeness_mean: float
    completeness_median: float
    scene_size: float


def scene_size(points: Tensor) -> float:
    """Return a scene's size: twice the root mean square distance of its points from their centroid.

    Unlike a bounding box it does not depend on the axes, and single outliers hardly change it.

    Args:
        points: Points ``[..., 3]``.

    Returns:
        The size in the points' unit of length.

    Raises:
        ValueError: If all points coincide.
    """
    check_shape("points", points, (3,))
    flat = points.reshape(-1, 3).double()
    size = 2 * float((flat - flat.mean(dim=0)).square().sum(dim=-1).mean().sqrt())
    if not size > 0:
        raise ValueError("points: the target points coincide, so the scene has no size")
    return size


def sample_evenly(points: Tensor, count: int) -> Tensor:
    """Return at most `count` of the points, spread over their order, without a random generator.

    Args:
        points: Points ``[N, 3]``.
        count: Largest number of points to return.

    Returns:
        ``[min(N, count), 3]``, in order; all points when N ≤ count.
    """
    total = points.shape[0]
    return points if total <= count else points[spread_indices(total, count, points.device)]


def spread_indices(total: int, count: int, device: torch.device | None = None) -> Tensor:
    """Return at most `count` indices below `total`, spread evenly, without a random generator.

    One is taken from each of `count` equal stretches, at an offset that follows the golden ratio.
    A plain stride would fall on the same image columns again and again.

    Args:
        total: Number of items to choose from.
        count: Largest number of indices to return.
        device: Device of the indices.

    Returns:
        ``[min(total, count)]`` int64, increasing.
    """
    if total <= count:
        return torch.arange(total, device=device)
    index = torch.arange(count, dtype=torch.float64, device=device)
    stretch = (index + (index * 0.6180339887498949).frac()) * (total / count)
    return stretch.long().clamp(max=total - 1)


def nearest_distances(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances to the nearest point of the other cloud, both ways, in bounded memory.

    Args:
        first: Points ``[N, 3]``.
        second: Points ``[M, 3]`` of the same dtype.

    Returns:
        ``[N]`` distances from first to second, and ``[M]`` from second to first.

    Raises:
        ValueError: If a cloud is empty.
    """
    if len(first) == 0 or len(second) == 0:
        raise ValueError(f"point clouds: found {len(first)} and {len(second)} points")
    forward = []
    backward = torch.full_like(second[:, 0], torch.inf)
    for chunk in torch.split(first, max(1, _CHUNK // len(second))):
        # The matrix-multiplication form loses small distances to cancellation.
        distance = torch.cdist(chunk, second, compute_mode="donot_use_mm_for_euclid_dist")
        forward.append(distance.amin(dim=1))
        backward = torch.minimum(backward, distance.amin(dim=0))
    return torch.cat(forward), backward


def _select(name: str, points: Tensor, valid: Tensor | None) -> Tensor:
    check_shape(name, points, (3,))
    if valid is not None:
        if valid.shape != points.shape[:-1]:
            raise ValueError(
                f"{name}: expected a mask of shape {list(points.shape[:-1])}, "
                f"found {list(valid.shape)}"
            )
        points = points[valid.bool()]
    flat = points.reshape(-1, 3)
    if len(flat) == 0:
        raise ValueError(f"{name}: no valid point")
    check_finite(name, flat)
    return flat


def point_metrics(
    predicted: Tensor,
    target: Tensor,
    alignment: Similarity,
    *,
    valid_predicted: Tensor | None = None,
    valid_target: Tensor | None = None,
    max_points: int = 5_000,
) -> PointMetrics:
    """Return accuracy and completeness of a point cloud.

    The clouds need no correspondence. Each is thinned to `max_points` points, so distances much
    below the spacing of such a sample are not resolved, unless the clouds correspond pixel by pixel
    (then the same pixels are taken, and equal clouds are at distance 0).

    Args:
        predicted: World points ``[..., 3]``.
        target: World points ``[..., 3]``, any number.
        alignment: Transform of the predicted points to the target's world: `align_trajectories` of
            the cameras, `umeyama` of corresponding points, or `Similarity.identity`.
        valid_predicted: Mask ``[...]`` of the predicted points to use, or None for all.
        valid_target: Mask ``[...]`` of the target points to use, or None for all.
        max_points: Largest number of points per cloud, 5,000 by default.

    Raises:
        ValueError: If shapes are wrong, a used point is NaN or infinite, a cloud is empty, or the
            target points coincide.
    """
    flat_predicted = _select("predicted", predicted, valid_predicted)
    flat_target = _select("target", target, valid_target)
    size = scene_size(flat_target)
    origin = flat_target.double().mean(dim=0)

    def normalise(points: Tensor) -> Tensor:
        # Points lie around 0 and are of the order of 1, so float32 resolves 1e-7 of the scene.
        return ((points.double() - origin) / size).float()

    source = normalise(alignment.apply(sample_evenly(flat_predicted, max_points)))
    destination = normalise(sample_evenly(flat_target, max_points))
    accuracy, completeness = nearest_distances(source, destination)
    return PointMetrics(
        accuracy_mean=float(accuracy.double().mean()),
        accuracy_median=float(accuracy.median()),
        completeness_mean=float(completeness.double().mean()),
        completeness_median=float(completeness.median()),
        scene_size=size,
    )


def point_deviation(
    predicted: Tensor, target: Tensor, alignment: Similarity, valid: Tensor | None = None
) -> float:
    """Return the mean distance of corresponding points as a fraction of the scene size.

    It is cheaper than `point_metrics` and stricter: a point is compared with that of its own pixel.

    Args:
        predicted: World points ``[..., 3]``.
        target: World points ``[..., 3]`` of the same pixels.
        alignment: Transform of the predicted points to the target's world.
        valid: Mask ``[...]`` of the pixels to use, or None for all.

    Raises:
        ValueError: If shapes are wrong or differ, a used point is NaN or infinite, no pixel is
            valid, or the target points coincide.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"target: expected shape {list(predicted.shape)}, found {list(target.shape)}"
        )
    source = _select("predicted", predicted, valid)
    destination = _select("target", target, valid)
    distance = (alignment.apply(source) - destination.double()).norm(dim=-1)
    return float(distance.mean()) / scene_size(destination)
