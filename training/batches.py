"""Training batches: clips of a pool, recorded by random cameras, in the model's units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .curriculum import SOURCES, BatchShape
from .scenes.photography import brightness, photograph, random_camera
from .shards import BRIGHTEST, Shard, read_shards

SKY = 4.0  # depth of the sky, in mean depths of what frame 0 shows beside it
PLAIN_SHARE = 0.5  # of the clips from the old generator; it has no camera's imperfections
SHUFFLED_CHANNELS_SHARE = 0.3


@dataclass(frozen=True)
class Batch:
    """B clips of S frames. The world is frame 0, and the unit of length is its mean depth."""

    images: Tensor  # [B, S, 3, H, W] in [0, 1]
    depth: Tensor  # [B, S, H, W]
    extrinsics: Tensor  # [B, S, 3, 4] world-to-camera
    fov: Tensor  # [B, 2] radians, vertical and horizontal

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        return Batch(*(t.to(device) for t in (self.images, self.depth, self.extrinsics, self.fov)))


class Pool:
    """The shards of a folder. `refresh` adds the shards that were rendered meanwhile.

    Args:
        folder: Folder that `training.pool` and `training.path_traced` write to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[str, Shard] = {}
        self.refresh()

    def refresh(self) -> int:
        """Add the shards that have been finished since the last call.

        Returns:
            Number of scenes in all shards.
        """
        self._shards = read_shards(self.folder) | self._shards
        return sum(len(shard.fov) for shard in self._shards.values())

    def sample(self, shape: BatchShape, generator: torch.Generator) -> Batch:
        """Return a batch of random, augmented clips.

        Args:
            shape: Size of the batch.
            generator: CPU generator.

        Returns:
            The batch, on the CPU.

        Raises:
            ValueError: If no shard has clips of that size and length.
        """
        sources: dict[str, list[Shard]] = {}
        for shard in self._shards.values():
            if shard.size == shape.size and shard.frames >= shape.frames:
                sources.setdefault(shard.source, []).append(shard)
        if not sources:
            height, width = shape.size
            raise ValueError(
                f"no clips of {shape.frames} frames or more at {height}x{width} below {self.folder}"
            )
        weights = torch.tensor([SOURCES[name] for name in sources])
        drawn = torch.multinomial(weights, shape.clips, replacement=True, generator=generator)
        names = [list(sources)[index] for index in drawn.tolist()]
        clips = [_clip(sources[name], shape.frames, generator) for name in names]
        codes, depth, extrinsics, fov = (torch.stack(part) for part in zip(*clips, strict=True))
        images = _images(codes, names, generator)
        return _mirrored(_normalised(images, depth, extrinsics, fov), generator)


def _clip(
    shards: Sequence[Shard], frames: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a random scene's frames: a stretch or a subset, forwards, backwards or shuffled."""
    draw = torch.rand(5, generator=generator).tolist()
    shard = shards[int(draw[0] * len(shards))]
    row = int(draw[1] * len(shard.fov))
    available = shard.frames
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
        torch.from_numpy(shard.fov[row].copy()),
    )


def _images(codes: Tensor, sources: Sequence[str], generator: torch.Generator) -> Tensor:
    """Turn codes `[B, S, 3, H, W]` into what cameras record; colour channels may be swapped."""
    batch, frames = codes.shape[:2]
    order = torch.arange(3).repeat(batch, 1)
    for row in range(batch):
        if torch.rand(1, generator=generator) < SHUFFLED_CHANNELS_SHARE:
            order[row] = torch.randperm(3, generator=generator)
    light = torch.stack([clip[:, o] for clip, o in zip(codes, order, strict=True)])
    radiance = (light.float() / 255).square_() * BRIGHTEST
    camera = random_camera(batch, frames, generator, generator)
    recorded = photograph(radiance, camera, brightness(radiance).mean(dim=1), generator)
    plain = torch.tensor([name == "v1" for name in sources])
    plain &= torch.rand(batch, generator=generator) < PLAIN_SHARE
    return torch.where(plain[:, None, None, None, None], radiance.sqrt().clamp(max=1.0), recorded)


def _normalised(images: Tensor, depth: Tensor, extrinsics: Tensor, fov: Tensor) -> Batch:
    """Express depth and poses in the axes of frame 0 and in units of its mean depth."""
    depth = depth.float()
    finite = depth.isfinite()
    seen = torch.where(finite[:, 0], depth[:, 0], 0.0).sum(dim=(1, 2))
    seen = seen / finite[:, 0].sum(dim=(1, 2)).clamp(min=1)
    depth = torch.where(finite, depth, SKY * seen[:, None, None, None])
    unit = depth[:, 0].mean(dim=(1, 2))  # [B]
    rotation, translation = extrinsics[..., :3], extrinsics[..., 3]
    relative = rotation @ rotation[:, :1].transpose(2, 3)
    moved = translation - (relative @ translation[:, :1, :, None])[..., 0]
    moved = moved / unit[:, None, None]
    return Batch(
        images, depth / unit[:, None, None, None], torch.cat([relative, moved[..., None]], 3), fov
    )


def _mirrored(batch: Batch, generator: torch.Generator) -> Batch:
    """Mirror half of the clips left to right, with their poses."""
    flip = torch.rand(len(batch.fov), generator=generator) < 0.5
    sign = torch.tensor([-1.0, 1.0, 1.0])
    both = torch.cat([sign[:, None] * sign, sign[:, None]], dim=1)  # [3, 4]: M R M and M t
    images = torch.where(flip[:, None, None, None, None], batch.images.flip(-1), batch.images)
    depth = torch.where(flip[:, None, None, None], batch.depth.flip(-1), batch.depth)
    extrinsics = torch.where(flip[:, None, None, None], batch.extrinsics * both, batch.extrinsics)
    return replace(batch, images=images, depth=depth, extrinsics=extrinsics)
