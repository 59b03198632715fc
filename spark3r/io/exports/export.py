"""A reconstruction in the formats of other programs.

FOLDER/images/00000.jpg    the original of each frame, upright (colmap, nerfstudio)
FOLDER/sparse/0/           COLMAP's model, binary and text (colmap)
FOLDER/transforms.json     nerfstudio's cameras, with depths/ and points.ply (nerfstudio)
FOLDER/scene.glb           the cloud and the cameras (glb)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import Spark3rError
from ..originals import write_originals
from ..outputs import LEAST_CONFIDENT_PERCENT
from ..point_cloud import write_ply
from ..reading import Output
from .cloud import coloured_cloud
from .colmap import write_model
from .glb import write_glb
from .matching import INSTALL, match_frames
from .nerfstudio import write_transforms
from .overlap import overlapping_pairs
from .refinement import Refinement, refine
from .tracks import Cameras, Features, Matches, Tracks, track_numbers, triangulate

__all__ = ["CLOUD_POINTS", "FORMATS", "Export", "export_output"]

FORMATS = ("colmap", "nerfstudio", "glb")

CLOUD_POINTS = 200_000
"""Largest number of points of an exported cloud."""

_LEAST_LIMIT = 4.0  # pixels; COLMAP's own limit of a reprojection error


@dataclass(frozen=True, eq=False)
class Export:
    """What an export holds.

    Attributes:
        cameras: The cameras at the size of the originals, as they were written.
        points: Number of points of COLMAP's model; None without one.
        observations: Number of their observations; 0 where pycolmap is missing.
        reprojection_px: Mean reprojection error of the observations in pixels; None without any.
        refinement: The bundle adjustment, if one was asked for.
    """

    cameras: Cameras
    points: int | None
    observations: int
    reprojection_px: float | None
    refinement: Refinement | None


def export_output(
    output: Output,
    folder: Path,
    formats: Collection[str] = FORMATS,
    *,
    source: str | None = None,
    refined: bool = False,
    say: Callable[[str], object] = lambda message: None,
) -> Export:
    """Write a reconstruction in the formats of other programs.

    Points of COLMAP's model are triangulated from matches between the frames. Without pycolmap the
    model has the predicted points instead, and no tracks.

    Args:
        output: The reconstruction, from `read_output`.
        folder: An existing, empty folder.
        formats: Some of `FORMATS`.
        source: The footage; None takes the place that the reconstruction names.
        refined: True refines the cameras by a bundle adjustment, and keeps what it had where that
            does not help.
        say: Callback(message), for steps that take long.

    Raises:
        ClipError: If the footage is no longer there, or is not the one that was reconstructed.
        Spark3rError: If a file cannot be read or written, or ``refined`` is True and pycolmap is
            missing or the matches are too few.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise Spark3rError(f"format '{unknown[0]}', expected some of {', '.join(FORMATS)}")
    cameras = Cameras(output.extrinsics.numpy(), output.intrinsics.numpy(), output.sizes)
    names: tuple[str, ...] = ()
    matches: Matches | None = None
    refinement: Refinement | None = None
    tracks: Tracks | None = None
    try:
        if refined or set(formats) & {"colmap", "nerfstudio"}:
            (folder / "images").mkdir()
            say("writing the images")
            names = write_originals(output, folder / "images", source)
        if refined or ("colmap" in formats and find_spec("pycolmap") is not None):
            say("matching the frames")
            pairs = overlapping_pairs(output, cameras)
            matches = match_frames(folder / "images", names, cameras, pairs)
        if refined and matches is not None:
            say("refining the cameras")
            refinement = refine(cameras, names, matches)
            cameras = refinement.cameras
        if formats != {"colmap"} or matches is None:
            points, colours = coloured_cloud(output, cameras, CLOUD_POINTS, LEAST_CONFIDENT_PERCENT)
        if "colmap" in formats:
            (folder / "sparse" / "0").mkdir(parents=True)
            if matches is None:
                say(f"note: points have no tracks, as pycolmap is missing: {INSTALL}")
                features, tracks = _none(), _untracked(points, colours)
            else:
                features, tracks = matches.features, _tracks(matches, cameras)
            write_model(folder / "sparse" / "0", cameras, names, features, tracks)
        if "nerfstudio" in formats:
            write_ply(folder / "points.ply", torch.from_numpy(points), torch.from_numpy(colours))
            write_transforms(folder, output, cameras, names, "points.ply")
        if "glb" in formats:
            write_glb(folder / "scene.glb", points, colours, cameras)
    except OSError as error:
        reason = error.strerror or str(error)
        raise Spark3rError(f"the export cannot be written in {folder.parent} ({reason})") from error
    seen = tracks is not None and len(tracks.error) > 0
    return Export(
        cameras,
        None if tracks is None else len(tracks.points),
        0 if tracks is None else len(tracks.error),
        float(tracks.error.mean()) if tracks is not None and seen else None,
        refinement,
    )


def _tracks(matches: Matches, cameras: Cameras) -> Tracks:
    """Return the points of all matches, without observations that are far from the median error."""
    label = track_numbers(matches)
    every = triangulate(matches.features, label, cameras)
    if not len(every.error):
        return every
    limit = max(_LEAST_LIMIT, 3 * float(np.median(every.error)))
    return triangulate(matches.features, label, cameras, limit)


def _none() -> Features:
    return Features(np.zeros(0, np.int64), np.zeros((0, 2)), np.zeros((0, 3), np.uint8))


def _untracked(points: NDArray[np.float32], colours: NDArray[np.uint8]) -> Tracks:
    nothing = np.zeros(0, np.int64)
    return Tracks(points.astype(np.float64), colours, nothing, nothing, np.zeros(0))
