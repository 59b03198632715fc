"""Training batches: augmented clips from a rendered pool, in the model's units."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B clips of S frames. The world is frame 0, and the unit of length is its mean depth."""

    images: Tensor  # [B, S, 3, H, W] in [0, 1]
    depth: Tensor  # [B, S, H, W]
    extrinsics: Tensor  # [B, S, 3, 4] world-to-camera
    fov: Tensor  # [B] radians, vertical and horizontal

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        return Batch(*(t.to(device) for t in (self.images, self.depth, self.extrinsics, self.fov)))


@dataclass(frozen=True)
class _Shard:
    images: np.ndarray
    depth: np.ndarray
    extrinsics: np.ndarray
    fov: np.ndarray


class Pool:
    """The shards of a folder. `refresh` adds the shards that were rendered meanwhile.

    Args:
        folder: Folder that `training.pool` writes to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[str, _Shard] = {}
        self.refresh()

    def refresh(self) -> int:
        """Add the shards that have been finished since the last call.

        Returns:
            Number of scenes in all shards.
        """
        for path in sorted(self.folder.glob("*-*")):
            if path.suffix != ".partial" and path.name not in self._shards:
                arrays = (
                    np.load(path / f"{name}.npy", mmap_mode="r")
                    for name in ("images", "depth", "extrinsics", "fov")
                )
                self._shards[path.name] = _Shard(*arrays)
        return sum(len(shard.fov) for shard in self._shards.values())

    def sample(
        self, batch: int, frames: int, generator: torch.Generator, flicker: float = 1.0
    ) -> Batch:
        """Return a batch of random, augmented clips.

        Args:
            batch: Number of clips, B.
            frames: Frames per clip, S.
            generator: CPU generator.
            flicker: Strength of the noise and of the changes of exposure between frames, 0 to 1.

        Returns:
            The batch, on the CPU.

        Raises:
            ValueError: If no shard has clips of at least `frames` frames.
        """
        shards = [s for s in self._shards.values() if s.images.shape[1] >= frames]
        if not shards:
            raise ValueError(f"no clips of {frames} frames or more below {self.folder}")
        clips = [_clip(shards, frames, generator) for _ in range(batch)]
        images, depth, extrinsics, fov = (torch.stack(part) for part in zip(*clips, strict=True))
        batch_ = _normalise(_photometric(images, generator, flicker), depth, extrinsics, fov)
        return _mirror(batch_, generator)


def _clip(
    shards: list[_Shard], frames: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a random scene's frames: a stretch or a subset, forwards, backwards or shuffled."""
    draw = torch.rand(5, generator=generator).tolist()
    shard = shards[int(draw[0] * len(shards))]
    row = int(draw[1] * len(shard.fov))
    available = shard.images.shape[1]
    if draw[2] < 0.3:
        start = int(draw[3] * (available - frames + 1))
        chosen = torch.arange(start, start + frames)
    else:
        chosen = torch.randperm(available, generator=generator)[:frames].sort().values
    if draw[4] < 0.4:
        chosen = chosen.flip(0)
    elif draw[4] > 0.8:
        chosen = chosen[torch.randperm(frames, generator=generator)]
    index = chosen.numpy()
    return (
        torch.from_numpy(shard.images[row][index]),
        torch.from_numpy(shard.depth[row][index]),
        torch.from_numpy(shard.extrinsics[row][index]),
        torch.tensor(float(shard.fov[row])),
    )


def _photometric(images: Tensor, generator: torch.Generator, flicker: float) -> Tensor:
    """Change colour channels, brightness and contrast per clip, exposure and noise per frame."""
    batch, frames = images.shape[:2]
    order = torch.stack([torch.randperm(3, generator=generator) for _ in range(batch)])
    colours = images.float().div_(255.0)
    colours = torch.stack([clip[:, o] for clip, o in zip(colours, order, strict=True)])
    clip = torch.randn(batch, 1, 3, 1, 1, generator=generator)
    frame = torch.randn(batch, frames, 1, 1, 1, generator=generator)
    offset = 0.04 * torch.randn(batch, 1, 3, 1, 1, generator=generator)
    colours = colours * (1.0 + 0.1 * clip + 0.03 * flicker * frame) + offset
    noise = 0.02 * flicker * torch.rand(batch, 1, 1, 1, 1, generator=generator)
    return (colours + noise * torch.randn(colours.shape, generator=generator)).clamp_(0.0, 1.0)


def _normalise(images: Tensor, depth: Tensor, extrinsics: Tensor, fov: Tensor) -> Batch:
    """Express depth and poses in the axes of frame 0 and in units of its mean depth."""
    depth = depth.float()
    unit = depth[:, 0].mean(dim=(1, 2))  # [B]
    rotation, translation = extrinsics[..., :3], extrinsics[..., 3]
    relative = rotation @ rotation[:, :1].transpose(2, 3)
    moved = translation - (relative @ translation[:, :1, :, None])[..., 0]
    moved = moved / unit[:, None, None]
    return Batch(
        images, depth / unit[:, None, None, None], torch.cat([relative, moved[..., None]], 3), fov
    )


def _mirror(batch: Batch, generator: torch.Generator) -> Batch:
    """Mirror half of the clips left to right, with their poses."""
    flip = torch.rand(len(batch.fov), generator=generator) < 0.5
    sign = torch.tensor([-1.0, 1.0, 1.0])
    both = torch.cat([sign[:, None] * sign, sign[:, None]], dim=1)  # [3, 4]: M R M and M t
    images = torch.where(flip[:, None, None, None, None], batch.images.flip(-1), batch.images)
    depth = torch.where(flip[:, None, None, None], batch.depth.flip(-1), batch.depth)
    extrinsics = torch.where(flip[:, None, None, None], batch.extrinsics * both, batch.extrinsics)
    return Batch(images, depth, extrinsics, batch.fov)
