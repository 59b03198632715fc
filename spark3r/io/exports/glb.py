"""A GLB file of a cloud and of the cameras as frusta.

Source of the format: https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html. Coordinates are
those of the reconstruction. A node turns them from y down, z forward to glTF's y up, z backward.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tracks import Cameras, Floats

__all__ = ["write_glb"]

_JSON, _BINARY = 0x4E4F534A, 0x004E4942
_FLOAT, _BYTE, _SHORT = 5126, 5121, 5123
_POINTS, _LINES = 0, 1
_VERTICES, _INDICES = 34962, 34963
_UPSIDE_DOWN = [1.0, 0.0, 0.0, 0.0]  # half a turn about x, as a quaternion XYZW
_FRUSTUM = 0.03  # depth of a frustum, of the size of the scene
_EDGES = (0, 1, 0, 2, 0, 3, 0, 4, 1, 2, 2, 3, 3, 4, 4, 1)
_FIRST, _LAST = np.array([30, 90, 220]), np.array([240, 120, 30])  # colours, from blue to orange


def write_glb(
    path: Path, points: NDArray[np.float32], colours: NDArray[np.uint8], cameras: Cameras
) -> None:
    """Write a cloud, and one frustum for each camera, whose colours go from blue to orange.

    Args:
        path: The file.
        points: ``[N, 3]``, at least one.
        colours: ``[N, 3]``.
        cameras: The cameras.
    """
    parts = _Parts()
    cloud = {
        "mode": _POINTS,
        "attributes": {"POSITION": parts.places(points), "COLOR_0": parts.colours(colours)},
    }
    corners, shades, edges = _frusta(cameras, _extent(points, cameras))
    frusta = {
        "mode": _LINES,
        "attributes": {"POSITION": parts.places(corners), "COLOR_0": parts.colours(shades)},
        "indices": parts.indices(edges),
    }
    document = {
        "asset": {"version": "2.0", "generator": "spark3r"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [
            {"name": "reconstruction", "rotation": _UPSIDE_DOWN, "children": [1, 2]},
            {"name": "points", "mesh": 0},
            {"name": "cameras", "mesh": 1},
        ],
        "meshes": [
            {"name": "points", "primitives": [cloud]},
            {"name": "cameras", "primitives": [frusta]},
        ],
        "accessors": parts.accessors,
        "bufferViews": parts.views,
        "buffers": [{"byteLength": parts.length}],
    }
    text = json.dumps(document, allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    binary = b"".join(parts.content)
    whole = 12 + 8 + len(text) + 8 + len(binary)
    with path.open("wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, whole))
        file.write(struct.pack("<II", len(text), _JSON) + text)
        file.write(struct.pack("<II", len(binary), _BINARY) + binary)


class _Parts:
    """The arrays of a GLB file, one after another."""

    def __init__(self) -> None:
        self.content: list[bytes] = []
        self.length = 0
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []

    def places(self, values: NDArray[np.floating[Any]]) -> int:
        values = values.astype("<f4")
        ends = {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
        return self._add(values.tobytes(), _VERTICES, len(values), _FLOAT, "VEC3", **ends)

    def colours(self, values: NDArray[np.uint8]) -> int:
        opaque = np.full((len(values), 4), 255, np.uint8)  # entries begin at multiples of 4 bytes
        opaque[:, :3] = values
        return self._add(opaque.tobytes(), _VERTICES, len(values), _BYTE, "VEC4", normalized=True)

    def indices(self, values: NDArray[np.int64]) -> int:
        kind, code = ("<u2", _SHORT) if values.max() < 2**16 - 1 else ("<u4", _SHORT + 2)
        return self._add(values.astype(kind).tobytes(), _INDICES, len(values), code, "SCALAR")

    def _add(self, data: bytes, target: int, count: int, code: int, kind: str, **more: Any) -> int:
        self.views.append(
            {"buffer": 0, "byteOffset": self.length, "byteLength": len(data), "target": target}
        )
        accessor = {"bufferView": len(self.views) - 1, "componentType": code, "count": count}
        self.accessors.append({**accessor, "type": kind, **more})
        padded = data + b"\0" * (-len(data) % 4)
        self.content.append(padded)
        self.length += len(padded)
        return len(self.accessors) - 1


def _extent(points: NDArray[np.float32], cameras: Cameras) -> float:
    """Return the size of the scene, without the farthest points."""
    centres = cameras.centres
    middle = np.median(centres, axis=0)
    near = float(np.median(np.linalg.norm(points - middle, axis=1)))
    spread = float(np.linalg.norm(centres - middle, axis=1).max())
    return 2 * max(near, spread, 1e-6)


def _frusta(cameras: Cameras, extent: float) -> tuple[Floats, NDArray[np.uint8], NDArray[np.int64]]:
    """Return corners ``[5 S, 3]`` of frusta, their colours, and the ends of their edges."""
    corners, count = [], len(cameras.sizes)
    for (height, width), matrix, pose, centre in zip(
        cameras.sizes, cameras.intrinsics, cameras.extrinsics, cameras.centres, strict=True
    ):
        pixels = np.array([[0, 0], [width, 0], [width, height], [0, height]], float)
        rays = (pixels - matrix[:2, 2]) / matrix[(0, 1), (0, 1)]
        local = np.concatenate([rays, np.ones((4, 1))], axis=1) * _FRUSTUM * extent
        corners.append(np.concatenate([centre[None], local @ pose[:, :3] + centre]))
    late = np.linspace(0, 1, count)[:, None]
    shades = ((1 - late) * _FIRST + late * _LAST).round().astype(np.uint8)
    edges = np.arange(count)[:, None] * 5 + np.array(_EDGES)
    return np.concatenate(corners), shades.repeat(5, axis=0), edges.ravel()
