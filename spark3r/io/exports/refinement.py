"""Cameras refined by a bundle adjustment, and kept only where matches that it never saw agree."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...errors import Spark3rError
from ...metrics.pose import rotation_angle_deg
from .colmap import write_model
from .matching import load_pycolmap
from .tracks import Bools, Cameras, Ints, Matches, Tracks, track_numbers, triangulate

__all__ = ["HELD_OUT", "Refinement", "refine"]

HELD_OUT = 0.2
"""Share of the tracks that the adjustment never sees."""

LEAST_TRACKS = 30
"""Least number of held-out tracks on which cameras are judged."""

_SEED = 0
_ROUNDS = 3  # of adjustment, each with points triangulated anew
_LEAST_LIMIT = 4.0  # pixels; COLMAP's own limit of a reprojection error
_LEAST_LOSS = 0.5  # pixels; scale of the robust loss
_LEAST_SEEN = 20  # observations of a frame that is adjusted
_LEAST_GAIN = 0.01  # of the held-out error; a smaller one is noise
_LEAST_LEFT = 0.8  # of the held-out tracks, whose rays must still meet in front of the cameras
_SAME_CAMERA = 0.1  # relative difference of focal lengths of frames that one camera took
_ACCURACY = 0.5  # pixels, to which features lie where they should
_ITERATIONS, _TOLERANCE = 100, 1e-6


@dataclass(frozen=True, eq=False)
class Refinement:
    """The result of a bundle adjustment.

    Attributes:
        cameras: The cameras to use: adjusted ones, or the given ones after a roll-back.
        rolled_back: Why the given cameras were kept; None if the adjusted ones are used.
        held_out_tracks: Number of tracks that judged.
        held_out_px: Mean reprojection error of those tracks before and after, in pixels, each
            error capped at the same limit. Their points are triangulated anew both times.
        used_px: Median reprojection error of the other tracks before and after, in pixels.
        moved: Median distance that the camera centres moved, in the model's unit, after a
            similarity that aligns the adjusted cameras with the given ones.
        turned_deg: Median angle that they turned.
        focal: Median relative change of the focal length.
        track_length: Median number of frames in which an adjusted point is seen.
    """

    cameras: Cameras
    rolled_back: str | None
    held_out_tracks: int
    held_out_px: tuple[float, float]
    used_px: tuple[float, float]
    moved: float
    turned_deg: float
    focal: float
    track_length: float


def refine(cameras: Cameras, names: Sequence[str], matches: Matches) -> Refinement:
    """Adjust cameras to matches with pycolmap, and judge them by a fifth that is held out.

    Focal lengths are adjusted and principal points are not. Pixels are taken to be square: while a
    camera only turns about one axis, matches do not tell the focal length along it, and an
    adjustment stretches the scene. Frames of one size share a camera if
    their focal lengths differ by less than a tenth from the median, because a focal length for each
    frame trades off against its distance. Poses of frames with few observations stay. The world,
    with its scale, stays that of the given cameras. Cameras that agree with the matches to half a
    pixel are kept as they are: features are not more accurate.

    Args:
        cameras: The cameras.
        names: Name of each image file.
        matches: Matches between the frames.

    Raises:
        Spark3rError: If there are too few matches, or pycolmap is missing or fails.
    """
    features, label = matches.features, track_numbers(matches)
    held = (np.random.default_rng(_SEED).random(len(label)) < HELD_OUT)[label]
    judging = triangulate(features, np.where(held, label, -1), cameras)
    using = np.where(held, -1, label)
    before = triangulate(features, using, cameras)
    if len(judging.points) < LEAST_TRACKS:
        raise Spark3rError(
            f"the frames have {len(matches.pairs)} matches, which is too little to refine cameras: "
            f"{len(judging.points)} tracks are held out to judge, expected at least {LEAST_TRACKS}"
        )
    adjusted, tracks = _adjustable(cameras), before
    for _ in range(_ROUNDS):
        limit = _limit(triangulate(features, using, adjusted))
        tracks = triangulate(features, using, adjusted, limit)
        adjusted = _adjusted(adjusted, names, matches, tracks)
    adjusted = _aligned(adjusted, cameras)
    after = triangulate(features, np.where(held, label, -1), adjusted)
    errors = _held_out_errors(judging, after)
    why = _worse(errors, len(judging.points), len(after.points))
    if float(np.median(before.error)) < _ACCURACY:
        why = f"the cameras agree with the matches to {_ACCURACY} px already"
    final = triangulate(features, using, adjusted)
    tracks = triangulate(features, using, adjusted, _limit(final))
    moved = np.linalg.norm(adjusted.centres - cameras.centres, axis=1)
    turned = rotation_angle_deg(
        torch.from_numpy(adjusted.extrinsics[:, :, :3]),
        torch.from_numpy(cameras.extrinsics[:, :, :3]),
    )
    change = adjusted.intrinsics[:, (0, 1), (0, 1)] / cameras.intrinsics[:, (0, 1), (0, 1)]
    return Refinement(
        cameras if why else adjusted,
        why,
        len(judging.points),
        errors,
        (float(np.median(before.error)), float(np.median(final.error))),
        float(np.median(moved)),
        float(turned.median()),
        float(np.median(np.abs(change - 1))),
        float(np.median(tracks.lengths)),
    )


def _limit(tracks: Tracks) -> float:
    """Return the largest error of an observation that is not taken for an outlier, in pixels."""
    if not len(tracks.error):
        raise Spark3rError("the matches do not fit the cameras: no point lies in front of them")
    return max(_LEAST_LIMIT, 3 * float(np.median(tracks.error)))


def _held_out_errors(before: Tracks, after: Tracks) -> tuple[float, float]:
    """Return mean capped errors of the observations that both have, before and after."""
    cap = _limit(before)
    _, first, second = np.intersect1d(before.feature, after.feature, return_indices=True)
    if not len(first):
        return float(np.minimum(before.error, cap).mean()), cap
    return (
        float(np.minimum(before.error[first], cap).mean()),
        float(np.minimum(after.error[second], cap).mean()),
    )


def _worse(errors: tuple[float, float], tracks_before: int, tracks_after: int) -> str | None:
    """Return why adjusted cameras are not kept, or None."""
    before, after = errors
    if tracks_after < _LEAST_LEFT * tracks_before:
        return f"{tracks_before - tracks_after} of {tracks_before} held-out tracks fell apart"
    if not after < (1 - _LEAST_GAIN) * before:
        return "the matches that were held out do not agree better"
    return None


def _adjustable(cameras: Cameras) -> Cameras:
    """Return cameras of square pixels, the same for frames of one size if theirs are similar."""
    intrinsics = cameras.intrinsics.copy()
    mean = np.sqrt(intrinsics[:, 0, 0] * intrinsics[:, 1, 1])
    intrinsics[:, (0, 1), (0, 1)] = mean[:, None]
    for size in set(cameras.sizes):
        own = [number for number, each in enumerate(cameras.sizes) if each == size]
        middle = np.median(intrinsics[own], axis=0)
        focal = intrinsics[own][:, (0, 1), (0, 1)] / middle[(0, 1), (0, 1)]
        if np.abs(focal - 1).max() < _SAME_CAMERA:
            intrinsics[own] = middle
    return Cameras(cameras.extrinsics, intrinsics, cameras.sizes)


def _aligned(cameras: Cameras, target: Cameras) -> Cameras:
    """Return cameras in the world of the given ones.

    The rotation is the mean of those between their orientations. Centres alone do not determine it
    where the path is short or straight.
    """
    turns = np.einsum("sji,sjk->ik", target.extrinsics[:, :, :3], cameras.extrinsics[:, :, :3])
    left, _, right = np.linalg.svd(turns)
    rotation = left @ np.diag([1.0, 1.0, np.linalg.det(left @ right)]) @ right
    centres = cameras.centres @ rotation.T
    own, given = centres - centres.mean(axis=0), target.centres - target.centres.mean(axis=0)
    spread = float((own * own).sum())
    scale = float((own * given).sum()) / spread if spread > 0 else 1.0
    scale = scale if scale > 0 else 1.0
    centres = scale * own + target.centres.mean(axis=0)
    turned = cameras.extrinsics[:, :, :3] @ rotation.T
    moved = -np.einsum("sij,sj->si", turned, centres)
    return Cameras(
        np.concatenate([turned, moved[:, :, None]], axis=2), cameras.intrinsics, cameras.sizes
    )


def _adjusted(cameras: Cameras, names: Sequence[str], matches: Matches, tracks: Tracks) -> Cameras:
    """Return the cameras after one bundle adjustment of the tracks."""
    pycolmap = load_pycolmap()
    tracks = _of_firm_frames(matches, tracks, len(names))
    options = pycolmap.BundleAdjustmentOptions()
    options.print_summary = False
    options.ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY
    options.ceres.loss_function_scale = max(_LEAST_LOSS, float(np.median(tracks.error)))
    options.ceres.solver_options.max_num_iterations = _ITERATIONS
    options.ceres.solver_options.function_tolerance = _TOLERANCE
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch), cameras, names, matches.features, tracks)
        try:
            model = pycolmap.Reconstruction(scratch)
            seen = np.unique(matches.features.frame[tracks.feature])
            config = pycolmap.BundleAdjustmentConfig()
            for number in seen.tolist():
                config.add_image(number + 1)
            config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
            pycolmap.create_default_bundle_adjuster(options, config, model).solve()
        except (RuntimeError, ValueError) as error:
            raise Spark3rError(f"pycolmap cannot adjust the cameras: {error}") from error
    images = [model.images[number + 1] for number in range(len(names))]
    extrinsics = np.stack([image.cam_from_world().matrix() for image in images])
    intrinsics = np.stack([image.camera.calibration_matrix() for image in images])
    if not (np.isfinite(extrinsics).all() and np.isfinite(intrinsics).all()):
        raise Spark3rError("pycolmap cannot adjust the cameras: it returned no numbers")
    return Cameras(extrinsics, intrinsics, cameras.sizes)


def _of_firm_frames(matches: Matches, tracks: Tracks, frames: int) -> Tracks:
    """Return tracks without observations in frames that have too few to be adjusted."""
    frame = matches.features.frame[tracks.feature]
    firm: Bools = np.bincount(frame, minlength=frames)[frame] >= _LEAST_SEEN
    left: Ints = np.bincount(tracks.track[firm], minlength=len(tracks.points))
    keep = firm & (left >= 2)[tracks.track]
    if not keep.any():
        raise Spark3rError(
            f"no frame has {_LEAST_SEEN} matches, which is too little to refine cameras"
        )
    kept, number = np.unique(tracks.track[keep], return_inverse=True)
    return Tracks(
        tracks.points[kept],
        tracks.colours[kept],
        number,
        tracks.feature[keep],
        tracks.error[keep],
    )
