"""COLMAP's sparse model, binary and text.

Source of the format: https://colmap.github.io/format.html. Image number ``i + 1`` is
frame ``i``. Models predict a camera for each frame; frames whose cameras are equal share one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...geometry import matrix_to_quaternion
from .tracks import Cameras, Features, Floats, Ints, Tracks

__all__ = ["write_model"]

_SIMPLE_PINHOLE, _PINHOLE = 0, 1  # one focal length, or one for each axis


def write_model(
    folder: Path, cameras: Cameras, names: Sequence[str], features: Features, tracks: Tracks
) -> None:
    """Write ``cameras``, ``images`` and ``points3D`` as ``.bin`` and as ``.txt``.

    Args:
        folder: An existing folder.
        cameras: The cameras, at the size of the image files.
        names: Name of each image file, without white space.
        features: The features; only those of a track are written.
        tracks: The points.
    """
    frame = features.frame[tracks.feature]
    seen = [np.flatnonzero(frame == number) for number in range(len(names))]
    index = np.zeros(len(frame), np.int64)  # of each observation among those of its image
    for observations in seen:
        index[observations] = np.arange(len(observations))
    camera_of = _camera_numbers(cameras)
    rotation = torch.from_numpy(cameras.extrinsics[:, :, :3])
    quaternions = matrix_to_quaternion(rotation).numpy()[:, [3, 0, 1, 2]]  # scalar first
    poses = np.concatenate([quaternions, cameras.extrinsics[:, :, 3]], axis=1)
    places = features.place[tracks.feature]
    lengths = tracks.lengths
    errors = np.bincount(tracks.track, tracks.error, len(tracks.points)) / np.maximum(lengths, 1)
    _write_cameras(folder, cameras, camera_of)
    _write_images(folder, poses, camera_of, names, seen, places, tracks.track)
    _write_points(folder, tracks, frame, index, errors, lengths)


def _camera_numbers(cameras: Cameras) -> list[int]:
    """Return the number of the camera of each frame: 1 + that of the first frame that has it."""
    first: dict[object, int] = {}
    keys = zip(cameras.sizes, (matrix.tobytes() for matrix in cameras.intrinsics), strict=True)
    return [first.setdefault(key, number) for number, key in enumerate(keys, start=1)]


def _write_cameras(folder: Path, cameras: Cameras, camera_of: Sequence[int]) -> None:
    own = sorted(set(camera_of))
    binary = [struct.pack("<Q", len(own))]
    text = ["# Camera list: CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]"]
    for number in own:
        (height, width), matrix = cameras.sizes[number - 1], cameras.intrinsics[number - 1]
        fx, fy, cx, cy = (float(matrix[at]) for at in ((0, 0), (1, 1), (0, 2), (1, 2)))
        code, model, values = (
            (_SIMPLE_PINHOLE, "SIMPLE_PINHOLE", [fx, cx, cy])
            if fx == fy
            else (_PINHOLE, "PINHOLE", [fx, fy, cx, cy])
        )
        binary.append(struct.pack("<IiQQ", number, code, width, height))
        binary.append(struct.pack(f"<{len(values)}d", *values))
        text.append(f"{number} {model} {width} {height} {_words(values)}")
    _write(folder / "cameras", binary, text)


def _write_images(
    folder: Path,
    poses: Floats,
    camera_of: Sequence[int],
    names: Sequence[str],
    seen: Sequence[Ints],
    places: Floats,
    track: Ints,
) -> None:
    binary = [struct.pack("<Q", len(names))]
    text = [
        "# Image list: IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME\n"
        "# and in the next line POINTS2D[] as X, Y, POINT3D_ID"
    ]
    observation = np.dtype([("place", "<f8", 2), ("point", "<u8")])
    each = zip(poses, camera_of, names, seen, strict=True)
    for number, (pose, camera, name, own) in enumerate(each, start=1):
        rows = np.empty(len(own), observation)
        rows["place"], rows["point"] = places[own], track[own] + 1
        binary.append(struct.pack("<I7dI", number, *pose, camera))
        binary += [name.encode() + b"\0", struct.pack("<Q", len(own)), rows.tobytes()]
        text.append(f"{number} {_words(pose)} {camera} {name}")
        seen_here = zip(rows["place"].tolist(), rows["point"].tolist(), strict=True)
        text.append(" ".join(f"{x!r} {y!r} {point}" for (x, y), point in seen_here))
    _write(folder / "images", binary, text)


def _write_points(
    folder: Path,
    tracks: Tracks,
    frame: Ints,
    index: Ints,
    errors: Floats,
    lengths: Ints,
) -> None:
    binary = [struct.pack("<Q", len(tracks.points))]
    text = ["# Points: POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as IMAGE_ID, POINT2D_IDX"]
    elements = np.stack([frame + 1, index], axis=1)
    ends = np.cumsum(lengths)
    for number, point in enumerate(tracks.points):
        own = elements[ends[number] - lengths[number] : ends[number]]
        colour, error = tracks.colours[number].tolist(), float(errors[number])
        binary.append(struct.pack("<Q3d3BdQ", number + 1, *point, *colour, error, len(own)))
        binary.append(own.astype("<u4").tobytes())
        red, green, blue = colour
        track = " ".join(map(str, own.ravel().tolist()))
        text.append(f"{number + 1} {_words(point)} {red} {green} {blue} {error!r} {track}".rstrip())
    _write(folder / "points3D", binary, text)


def _words(values: Sequence[float] | Floats) -> str:
    return " ".join(repr(float(value)) for value in values)


def _write(stem: Path, binary: Sequence[bytes], text: Sequence[str]) -> None:
    stem.with_suffix(".bin").write_bytes(b"".join(binary))
    stem.with_suffix(".txt").write_text("\n".join(text) + "\n", encoding="utf-8")
