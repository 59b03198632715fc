"""A folder that ``spark3r run`` wrote, read back: cameras, depth and the source of the frames."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import Spark3rError
from ..transform import Transform

__all__ = ["Output", "read_output"]

_ORIENTATIONS = range(1, 9)


@dataclass(frozen=True, eq=False)
class Output:
    """Cameras of a reconstruction at the size of the original images, and where its files are.

    Attributes:
        folder: The folder that ``spark3r run`` wrote.
        source: The footage, as ``--clip`` named it.
        frames: Name of each frame in the footage, S of them.
        transforms: Where the pixels of each original lie in its depth map.
        extrinsics: World to camera, ``[S, 3, 4]`` float64, OpenCV axes.
        intrinsics: In pixels of the originals, turned upright, ``[S, 3, 3]`` float64.
        depth_size: Height and width of the depth maps in pixels.
    """

    folder: Path
    source: str
    frames: tuple[str, ...]
    transforms: tuple[Transform, ...]
    extrinsics: Tensor
    intrinsics: Tensor
    depth_size: tuple[int, int]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every original, turned upright."""
        return tuple(transform.upright_size for transform in self.transforms)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every original at the scale of its depth map."""
        return tuple(
            (max(1, round(height * down)), max(1, round(width * right)))
            for (height, width), (right, down) in (
                (each.upright_size, each.scale) for each in self.transforms
            )
        )

    def depth(self, number: int) -> Tensor:
        """Return the depth of a frame, ``[H, W]`` float32.

        Raises:
            Spark3rError: If the file is missing or holds something else.
        """
        return self._array("depth", number)

    def confidence(self, number: int) -> Tensor:
        """Return the confidence of a frame's depth, ``[H, W]`` float32.

        Raises:
            Spark3rError: If the file is missing or holds something else.
        """
        return self._array("confidence", number)

    def colours(self, number: int) -> NDArray[np.uint8]:
        """Return the model's image of a frame, ``[H, W, 3]``, from its preview.

        Raises:
            Spark3rError: If the file is missing or holds something else.
        """
        from PIL import Image

        path = self.folder / "preview" / f"{number:05}.png"
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise Spark3rError(f"{path} cannot be read ({_reason(error)})") from error
        height, width = self.depth_size
        if pixels.shape[0] != height or pixels.shape[1] < width:
            raise Spark3rError(f"{path}: expected an image of {height} rows, as in cameras.json")
        return pixels[:, :width]

    def original_depth(self, number: int) -> Tensor:
        """Return the depth of a whole original at the scale of its depth map, ``[h, w]`` float32.

        It is 0 where the depth map does not show the original. Each pixel takes the value of the
        nearest pixel of the depth map.
        """
        depth, transform = self.depth(number), self.transforms[number]
        rows, columns = self.shapes[number]
        height, width = transform.upright_size
        (right_scale, down_scale), (right, down) = transform.scale, transform.offset
        x = ((torch.arange(columns) + 0.5) * width / columns * right_scale + right).floor().long()
        y = ((torch.arange(rows) + 0.5) * height / rows * down_scale + down).floor().long()
        inside_x = (x >= 0) & (x < depth.shape[1])
        inside_y = (y >= 0) & (y < depth.shape[0])
        found = depth[y.clamp(0, depth.shape[0] - 1)][:, x.clamp(0, depth.shape[1] - 1)]
        return found * (inside_y[:, None] & inside_x)

    def _array(self, part: str, number: int) -> Tensor:
        path = self.folder / part / f"{number:05}.npy"
        try:
            values = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise Spark3rError(f"{path} cannot be read ({_reason(error)})") from error
        if not isinstance(values, np.ndarray) or values.shape != self.depth_size:
            raise Spark3rError(f"{path}: expected an array of {self.depth_size}, as cameras.json")
        return torch.from_numpy(values.astype(np.float32))


def read_output(folder: Path) -> Output:
    """Read the cameras of a folder that ``spark3r run`` wrote.

    Raises:
        Spark3rError: If a file is missing, is no JSON or lacks a part, or the reconstruction has no
            pinhole cameras.
    """
    if not folder.is_dir():
        raise Spark3rError(f"{folder}: there is no such folder; expected one that spark3r run made")
    cameras, run = _document(folder / "cameras.json"), _document(folder / "run.json")
    if isinstance(run, dict) and run.get("pinhole") is False:
        raise Spark3rError(
            f"{folder}: models of family '{run.get('family')}' predict no pinhole cameras, which "
            "other programs expect"
        )
    try:
        frames = cameras["frames"]
        transforms = tuple(_transform(frame["original"]) for frame in frames)
        extrinsics = _matrices([frame["extrinsics"] for frame in frames], (3, 4))
        own = _matrices([frame["intrinsics"] for frame in frames], (3, 3))
        return Output(
            folder,
            str(run["clip"]),
            tuple(str(frame["name"]) for frame in frames),
            transforms,
            extrinsics,
            _at_original_size(own, transforms),
            (int(cameras["height"]), int(cameras["width"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        missing = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise Spark3rError(
            f"{folder}: cameras.json and run.json are not those of spark3r run ({missing})"
        ) from error


def _at_original_size(intrinsics: Tensor, transforms: tuple[Transform, ...]) -> Tensor:
    """Return intrinsics of depth maps as those of the upright originals."""
    scale = torch.tensor([each.scale for each in transforms], dtype=torch.float64)
    offset = torch.tensor([each.offset for each in transforms], dtype=torch.float64)
    found = intrinsics.clone()
    found[:, :2, 2] -= offset
    found[:, :2] /= scale[:, :, None]
    return found


def _transform(record: Mapping[str, Any]) -> Transform:
    right, down = map(float, record["scale"])
    x, y = map(float, record["offset"])
    size = int(record["height"]), int(record["width"])
    orientation = int(record["orientation"])
    if min(size) < 1 or orientation not in _ORIENTATIONS:
        raise ValueError(f"an original has size {size} and orientation {orientation}")
    if not (right > 0 and down > 0 and all(map(math.isfinite, (right, down, x, y)))):
        raise ValueError(f"an original has scale {[right, down]} and offset {[x, y]}")
    return Transform(size, (right, down), (x, y), orientation)


def _matrices(values: Any, shape: tuple[int, int]) -> Tensor:
    found = torch.tensor(values, dtype=torch.float64)
    if found.ndim != 3 or tuple(found.shape[1:]) != shape or len(found) < 1:
        raise ValueError(f"camera matrices have shape {list(found.shape)}, expected {list(shape)}")
    if not bool(found.isfinite().all()):
        raise ValueError("a camera matrix is not finite")
    return found


def _document(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Spark3rError(
            f"{path} cannot be read ({_reason(error)}); expected a folder that spark3r run made"
        ) from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
