"""Shards: training clips on disk, whatever rendered them.

This module needs numpy and nothing else, because the path tracer's environment has no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BRIGHTEST = 2.0  # radiance of the largest code; brighter light is cut off
GREY = 0.2  # mean radiance of a stored clip, by what a light meter reads


@dataclass(frozen=True)
class Shard:
    """n clips of F frames from one source, memory-mapped.

    Attributes:
        source: Name of what rendered them.
        images: uint8 `[n, F, 3, H, W]`, codes of radiance (see `encode_radiance`).
        depth: float16 `[n, F, H, W]`, along the optical axis, in metres; inf for the sky.
        extrinsics: float32 `[n, F, 3, 4]`, world-to-camera, OpenCV axes.
        fov: float32 `[n, 2]`, vertical and horizontal, in radians.
    """

    source: str
    images: NDArray[np.uint8]
    depth: NDArray[np.float16]
    extrinsics: NDArray[np.float32]
    fov: NDArray[np.float32]

    @property
    def frames(self) -> int:
        """Number of frames of a clip."""
        return int(self.images.shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame in pixels."""
        return int(self.images.shape[3]), int(self.images.shape[4])


def shard_name(source: str, size: tuple[int, int], frames: int, first_seed: int) -> str:
    """Return the name of a shard's folder."""
    return f"{source}-{size[0]}x{size[1]}-{frames:02d}-{first_seed:07d}"


def encode_radiance(radiance: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return 8-bit codes of radiance, which are proportional to its square root."""
    codes = np.sqrt(np.clip(radiance, 0.0, BRIGHTEST) / BRIGHTEST) * 255
    return np.round(codes).astype(np.uint8)


def exposure(radiance: NDArray[np.float32]) -> float:
    """Return the factor that brings a clip's mean radiance to `GREY`; lamps hardly count."""
    level = float(np.median(radiance)) + 1e-6
    return GREY / max(float(np.minimum(radiance, 8 * level).mean()), 1e-6)


def write_shard(
    folder: Path,
    name: str,
    images: NDArray[np.uint8],
    depth: NDArray[np.float16],
    extrinsics: NDArray[np.float32],
    fov: NDArray[np.float32],
) -> Path:
    """Write a shard, completely or not at all.

    Args:
        folder: Folder of the pool.
        name: Name of the shard; see `shard_name`.
        images: As `Shard.images`.
        depth: As `Shard.depth`.
        extrinsics: As `Shard.extrinsics`.
        fov: As `Shard.fov`.

    Returns:
        The shard's folder.
    """
    partial = folder / f"{name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    np.save(partial / "images.npy", images)
    np.save(partial / "depth.npy", depth)
    np.save(partial / "extrinsics.npy", extrinsics)
    np.save(partial / "fov.npy", fov)
    return partial.rename(folder / name)


def read_shards(folder: Path) -> dict[str, Shard]:
    """Map the finished shards of a folder into memory, by name."""
    shards = {}
    names = ("images", "depth", "extrinsics", "fov")
    for path in sorted(folder.glob("*-*")):
        if path.suffix != ".partial":
            arrays = (np.load(path / f"{name}.npy", mmap_mode="r") for name in names)
            shards[path.name] = Shard(path.name.split("-")[0], *arrays)
    return shards
