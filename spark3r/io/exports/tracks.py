"""Tracks: points of the scene, and the features of several frames in which each of them is seen.

A track is a group of features that real matches join. Its point is the one of least reprojection
error under given cameras. Arrays are NumPy's, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Cameras",
    "Features",
    "Matches",
    "Tracks",
    "reprojection",
    "track_numbers",
    "triangulate",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEAST_ANGLE_DEG = 1.5
"""Least angle between two rays of a track, as COLMAP's: below it the distance is not known."""

_ROUNDS = 3  # of triangulation, after each of which the worst features leave their tracks
_STEPS = 4  # of Gauss-Newton in each round
_DAMPING = 1e-6


@dataclass(frozen=True, eq=False)
class Cameras:
    """Pinhole cameras of S frames.

    Attributes:
        extrinsics: World to camera, ``[S, 3, 4]``, OpenCV axes.
        intrinsics: In pixels, ``[S, 3, 3]``.
        sizes: Height and width of each frame in pixels.
    """

    extrinsics: Floats
    intrinsics: Floats
    sizes: tuple[tuple[int, int], ...]

    @property
    def centres(self) -> Floats:
        """World positions, ``[S, 3]``."""
        rotation, translation = self.extrinsics[:, :, :3], self.extrinsics[:, :, 3]
        return -np.einsum("sji,sj->si", rotation, translation)


@dataclass(frozen=True, eq=False)
class Features:
    """Features of all frames, F in all.

    Attributes:
        frame: Number of the frame of each, ``[F]``.
        place: Where each lies in it, in pixels, ``[F, 2]``.
        colour: Colour of the pixel there, ``[F, 3]`` uint8.
    """

    frame: Ints
    place: Floats
    colour: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Matches:
    """Features, and the pairs of them that are matched and pass a check of two-view geometry.

    Attributes:
        features: The features.
        pairs: Numbers of two features, ``[M, 2]``.
        frame_pairs: Number of pairs of frames that were compared.
    """

    features: Features
    pairs: Ints
    frame_pairs: int


@dataclass(frozen=True, eq=False)
class Tracks:
    """N points with O observations.

    Attributes:
        points: ``[N, 3]`` in world coordinates.
        colours: ``[N, 3]`` uint8, each that of the point's first observation.
        track: Number of the point of each observation, ``[O]``, ascending.
        feature: Number of its feature, ``[O]``.
        error: Distance in pixels from each observation to the projection of its point, ``[O]``.
    """

    points: Floats
    colours: NDArray[np.uint8]
    track: Ints
    feature: Ints
    error: Floats

    @property
    def lengths(self) -> Ints:
        """Number of observations of each point, ``[N]``."""
        return np.bincount(self.track, minlength=len(self.points))


def track_numbers(matches: Matches) -> Ints:
    """Return for each feature the least number of a feature that matches join it to, ``[F]``."""
    label = np.arange(len(matches.features.frame), dtype=np.int64)
    first, second = matches.pairs[:, 0], matches.pairs[:, 1]
    while True:
        least = np.minimum(label[first], label[second])
        before = label.copy()
        np.minimum.at(label, label[first], least)
        np.minimum.at(label, label[second], least)
        label = label[label]
        if np.array_equal(before, label):
            return label


def triangulate(
    features: Features, label: Ints, cameras: Cameras, largest_error: float | None = None
) -> Tracks:
    """Return the points of tracks, each with the observations that agree with it.

    Features of one frame that share a track contradict each other, and all of them are left out.

    Args:
        features: The features.
        label: Number of each feature's track, ``[F]``, -1 for a feature that is left out.
        cameras: The cameras.
        largest_error: Observations that are farther from their point's projection are dropped, in
            pixels; None keeps all, and drops only points that lie behind a camera or that rays
            at less than `LEAST_ANGLE_DEG` see.
    """
    used = _without_contradictions(features, label)
    _, track = np.unique(label[used], return_inverse=True)
    count = int(track.max()) + 1 if len(track) else 0
    keep = np.ones(len(used), bool)
    limits = (None,) if largest_error is None else (3 * largest_error, largest_error, largest_error)
    points = np.zeros((count, 3))
    for limit in limits[:_ROUNDS]:
        keep &= np.bincount(track[keep], minlength=count)[track] >= 2
        points = _points(features, used[keep], track[keep], count, cameras)
        error, in_front = reprojection(points[track], features, used, cameras)
        keep &= in_front
        if limit is not None:
            keep &= error <= limit
    wide = _widest_angle(points, features.frame[used[keep]], track[keep], cameras)
    good = (np.bincount(track[keep], minlength=count) >= 2) & (wide >= LEAST_ANGLE_DEG)
    keep &= good[track]
    new = np.cumsum(good) - 1
    order = np.argsort(track[keep], kind="stable")
    kept, numbers = used[keep][order], new[track[keep]][order]
    error, _ = reprojection(points[good][numbers], features, kept, cameras)
    first = np.searchsorted(numbers, np.arange(int(good.sum())))
    return Tracks(points[good], features.colour[kept[first]], numbers, kept, error)


def reprojection(
    points: Floats, features: Features, chosen: Ints, cameras: Cameras
) -> tuple[Floats, Bools]:
    """Return the distance in pixels from features to projections, and which points lie in front.

    Args:
        points: World point of each chosen feature, ``[O, 3]``.
        features: The features.
        chosen: Numbers of the chosen ones, ``[O]``.
        cameras: The cameras.
    """
    frame = features.frame[chosen]
    seen = _in_camera(points, cameras.extrinsics[frame])
    in_front = seen[:, 2] > 0
    depth = np.where(in_front, seen[:, 2], 1.0)
    projected = np.einsum("oij,oj->oi", cameras.intrinsics[frame][:, :2], seen / depth[:, None])
    distance = np.linalg.norm(projected - features.place[chosen], axis=1)
    return np.where(in_front, distance, np.inf), in_front


def _in_camera(points: Floats, extrinsics: Floats) -> Floats:
    return np.einsum("oij,oj->oi", extrinsics[:, :, :3], points) + extrinsics[:, :, 3]


def _without_contradictions(features: Features, label: Ints) -> Ints:
    """Return numbers of features in tracks of at least two, alone in their track and frame."""
    frames = int(features.frame.max()) + 1 if len(label) else 1
    place = np.where(label >= 0, label * frames + features.frame, -1)
    _, first, count = np.unique(place, return_index=True, return_counts=True)
    alone = np.sort(first[(count == 1) & (place[first] >= 0)])
    per_track = np.bincount(label[alone], minlength=len(label) + 1)
    return alone[per_track[label[alone]] >= 2]


def _points(features: Features, used: Ints, track: Ints, count: int, cameras: Cameras) -> Floats:
    """Return the points of least squared reprojection error, from those nearest to the rays."""
    frame = features.frame[used]
    intrinsics, extrinsics = cameras.intrinsics[frame], cameras.extrinsics[frame]
    focal = intrinsics[:, (0, 1), (0, 1)]
    rays = np.concatenate(
        [(features.place[used] - intrinsics[:, :2, 2]) / focal, np.ones((len(used), 1))], axis=1
    )
    rays = np.einsum("oji,oj->oi", extrinsics[:, :, :3], rays)
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    across = np.eye(3) - rays[:, :, None] * rays[:, None, :]
    origin = np.einsum("oij,oj->oi", across, cameras.centres[frame])
    points = _solved(_summed(across, track, count), _summed(origin, track, count))
    for _ in range(_STEPS):
        seen = _in_camera(points[track], extrinsics)
        ahead = seen[:, 2] > 0
        depth = np.where(ahead, seen[:, 2], 1.0)[:, None]
        plane = seen[:, :2] / depth
        residual = (focal * plane + intrinsics[:, :2, 2] - features.place[used]) * ahead[:, None]
        slope = (
            focal[:, :, None]
            * (extrinsics[:, :2, :3] - plane[:, :, None] * extrinsics[:, 2:, :3])
            / depth[:, :, None]
        ) * ahead[:, None, None]
        normal = np.einsum("oki,okj->oij", slope, slope)
        gradient = np.einsum("oki,ok->oi", slope, residual)
        points = points - _solved(_summed(normal, track, count), _summed(gradient, track, count))
    return points


def _summed(values: Floats, track: Ints, count: int) -> Floats:
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    columns = [np.bincount(track, flat[:, i], minlength=count) for i in range(flat.shape[1])]
    summed: Floats = np.stack(columns, axis=1).astype(np.float64).reshape(count, *values.shape[1:])
    return summed


def _solved(matrix: Floats, right: Floats) -> Floats:
    size = np.trace(matrix, axis1=1, axis2=2)[:, None, None]
    damped = matrix + (_DAMPING * size + 1e-12) * np.eye(3)
    solved: Floats = np.linalg.solve(damped, right[:, :, None])[:, :, 0]
    return solved


def _widest_angle(points: Floats, frame: Ints, track: Ints, cameras: Cameras) -> Floats:
    """Return for each track the widest angle in degrees between its first ray and another."""
    count = len(points)
    rays = points[track] - cameras.centres[frame]
    rays /= np.maximum(np.linalg.norm(rays, axis=1, keepdims=True), 1e-12)
    first = np.full(count, -1)
    first[track[::-1]] = np.arange(len(track))[::-1]
    cosine = np.einsum("oi,oi->o", rays, rays[first[track]])
    least = np.ones(count)
    np.minimum.at(least, track, cosine)
    angle: Floats = np.degrees(np.arccos(np.clip(least, -1, 1)))
    return angle


def concatenated(parts: Sequence[Features]) -> Features:
    """Return the features of several frames as one."""
    return Features(
        np.concatenate([part.frame for part in parts]),
        np.concatenate([part.place for part in parts]),
        np.concatenate([part.colour for part in parts]),
    )
