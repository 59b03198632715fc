"""Known cameras of footage: from a ``cameras.json`` of ``spark3r run``, or a COLMAP model."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ClipError, first_line
from ..geometry import quaternion_to_matrix
from ..transform import UPRIGHT
from .clips import Footage

__all__ = ["check_cameras", "read_cameras"]


@dataclass(frozen=True, eq=False)
class Camera:
    """One camera.

    Attributes:
        extrinsics: World to camera, OpenCV axes, ``[3, 4]`` float64.
        focal: Horizontal and vertical focal length, pixels of the upright original.
        centre: Principal point in the upright original, ``(0, 0)`` at its upper left corner.
    """

    extrinsics: Tensor
    focal: tuple[float, float]
    centre: tuple[float, float]


def check_cameras(path: str) -> None:
    """Check that there are cameras of a known form, before a model is loaded.

    Raises:
        ClipError: If there are not.
    """
    _load(path)


def read_cameras(path: str, footage: Footage) -> tuple[Tensor, Tensor]:
    """Return the known cameras of footage: extrinsics ``[S, 3, 4]`` and intrinsics ``[S, 3, 3]``.

    Both are float32, world to camera, and in pixels of the clip.

    Args:
        path: A ``cameras.json``, or a folder with COLMAP's ``cameras`` and ``images`` as text or
            binary files, of which names must be those of the frames. COLMAP's cameras must be
            undistorted.
        footage: The footage.

    Raises:
        ClipError: If a frame has no camera, or the cameras cannot be read.
    """
    cameras = _load(path)
    extrinsics, intrinsics = [], []
    for name, transform in zip(footage.frames, footage.transforms, strict=True):
        camera = cameras.get(name)
        if camera is None:
            raise ClipError(f"--cameras {path} has no camera of '{name}', expected all frames")
        if transform.orientation != UPRIGHT and Path(path).is_dir():
            raise ClipError(
                f"--cameras {path}: '{name}' is turned by its EXIF orientation, which COLMAP does "
                "not follow: turn the images upright first"
            )
        (sx, sy), (ox, oy) = transform.scale, transform.offset
        (fx, fy), (cx, cy) = camera.focal, camera.centre
        extrinsics.append(camera.extrinsics)
        intrinsics.append([[fx * sx, 0, cx * sx + ox], [0, fy * sy, cy * sy + oy], [0, 0, 1]])
    return torch.stack(extrinsics).float(), torch.tensor(intrinsics)


def _load(path: str) -> Mapping[str, Camera]:
    where = Path(path)
    try:
        if where.is_file():
            return dict(_from_json(json.loads(where.read_text(encoding="utf-8"))))
        for suffix, read in ((".bin", _from_binary), (".txt", _from_text)):
            files = [where / f"{part}{suffix}" for part in ("cameras", "images")]
            if all(file.is_file() for file in files):
                return dict(read(*files))
    except ClipError:
        raise
    except Exception as error:  # a damaged file of any kind
        reason = first_line(error) or type(error).__name__
        raise ClipError(f"--cameras {path} cannot be read ({reason})") from error
    raise ClipError(
        f"--cameras {path}: expected the cameras.json of a run, or a folder with COLMAP's "
        "cameras.txt and images.txt, or cameras.bin and images.bin"
    )


def _from_json(document: Any) -> Iterator[tuple[str, Camera]]:
    for frame in document["frames"]:
        (fx, _, cx), (_, fy, cy), _ = frame["intrinsics"]
        (sx, sy), (ox, oy) = frame["original"]["scale"], frame["original"]["offset"]
        extrinsics = torch.tensor(frame["extrinsics"], dtype=torch.float64)
        if extrinsics.shape != (3, 4):
            raise ClipError(f"extrinsics of '{frame['name']}' are not 3x4")
        yield (
            frame["name"],
            Camera(extrinsics, (fx / sx, fy / sy), ((cx - ox) / sx, (cy - oy) / sy)),
        )


PINHOLES = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1}
"""COLMAP's models without distortion, and their numbers in binary files."""


def _from_text(cameras: Path, images: Path) -> Iterator[tuple[str, Camera]]:
    models: dict[str, tuple[float, ...]] = {}
    for line in _lines(cameras):
        number, model, _, _, *parameters = line.split()
        models[number] = _pinhole(model, tuple(map(float, parameters)))
    # Every second line has the points of an image, and may be empty.
    lines = [each for each in images.read_text(encoding="utf-8").splitlines() if each[:1] != "#"]
    for line in lines[::2]:
        if line.strip():
            _, *pose, number, name = line.split(maxsplit=9)
            yield name, _camera(tuple(map(float, pose)), models[number])


def _lines(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line


def _from_binary(cameras: Path, images: Path) -> Iterator[tuple[str, Camera]]:
    models: dict[int, tuple[float, ...]] = {}
    names = {number: name for name, number in PINHOLES.items()}
    content, place = cameras.read_bytes(), 8
    for _ in range(struct.unpack_from("<Q", content)[0]):
        number, model = struct.unpack_from("<ii", content, place)
        if model not in names:
            _pinhole(f"number {model}", ())
        count = 3 + model
        models[number] = _pinhole(
            names[model], struct.unpack_from(f"<{count}d", content, place + 24)
        )
        place += 24 + 8 * count
    content, place = images.read_bytes(), 8
    for _ in range(struct.unpack_from("<Q", content)[0]):
        _, *pose, number = struct.unpack_from("<i7di", content, place)
        end = content.index(b"\0", place + 64)
        name = content[place + 64 : end].decode()
        points = struct.unpack_from("<Q", content, end + 1)[0]
        place = end + 9 + 24 * points
        yield name, _camera(tuple(pose), models[number])


def _pinhole(model: str, parameters: tuple[float, ...]) -> tuple[float, ...]:
    """Return fx, fy, cx and cy."""
    if model == "SIMPLE_PINHOLE":
        focal, x, y = parameters
        return focal, focal, x, y
    if model == "PINHOLE":
        return parameters
    raise ClipError(
        f"COLMAP's camera model {model} is distorted, expected {' or '.join(PINHOLES)}: undistort "
        "the images first (colmap image_undistorter)"
    )


def _camera(pose: tuple[float, ...], model: tuple[float, ...]) -> Camera:
    w, x, y, z, *translation = pose
    quaternion = torch.tensor([x, y, z, w], dtype=torch.float64)
    rotation = quaternion_to_matrix(quaternion / quaternion.norm())
    moved = torch.tensor(translation, dtype=torch.float64)
    fx, fy, cx, cy = model
    return Camera(torch.cat((rotation, moved[:, None]), dim=1), (fx, fy), (cx, cy))
