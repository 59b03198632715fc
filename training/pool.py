"""Render a pool of training clips to disk: `python -m training.pool --output DIR`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from spark3r.reference.scenes.render import render_path
from spark3r.reference.scenes.scene import random_scene
from spark3r.reference.scenes.seeds import TRAINING

SHARD_SCENES = 64
SIDE = 64


def draw_path_times(seed: int, frames: int) -> torch.Tensor:
    """Return random path times of a training clip, float64 `[frames]`, in increasing order.

    Two clips in three cover the whole path. The others cover a shorter or longer stretch of it, so
    that gaps of every size between frames occur.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(frames + 2, generator=generator, dtype=torch.float64)
    u = (torch.arange(frames, dtype=torch.float64) + draw[2:]) / frames
    return u if draw[0] < 2 / 3 else u * (0.2 * 7.0 ** draw[1])


def render_shard(output: Path, first_seed: int, frames: int) -> Path:
    """Render the clips of `SHARD_SCENES` consecutive seeds into one folder.

    Args:
        output: Folder of the pool.
        first_seed: Seed of the first scene. All seeds of the shard must be training seeds.
        frames: Frames per scene, F.

    Returns:
        The shard's folder, with `images.npy` uint8 `[n, F, 3, 64, 64]`, `depth.npy` float16
        `[n, F, 64, 64]` (metres), `extrinsics.npy` float32 `[n, F, 3, 4]`, `fov.npy` float32 `[n]`
        (radians). It is written completely or not at all.

    Raises:
        ValueError: If a seed is not a training seed.
    """
    if first_seed not in TRAINING or first_seed + SHARD_SCENES - 1 not in TRAINING:
        raise ValueError(f"seeds from {first_seed} on are not training seeds ({TRAINING})")
    shard = output / f"{frames:02d}-{first_seed:07d}"
    if shard.exists():
        return shard
    images = np.empty((SHARD_SCENES, frames, 3, SIDE, SIDE), np.uint8)
    depth = np.empty((SHARD_SCENES, frames, SIDE, SIDE), np.float16)
    extrinsics = np.empty((SHARD_SCENES, frames, 3, 4), np.float32)
    fov = np.empty(SHARD_SCENES, np.float32)
    for row in range(SHARD_SCENES):
        seed = first_seed + row
        scene = random_scene(seed)
        colours, z, cameras = render_path(scene, draw_path_times(seed, frames), SIDE, SIDE)
        images[row] = (colours * 255).round().to(torch.uint8).numpy()
        depth[row], extrinsics[row], fov[row] = z.numpy(), cameras.numpy(), scene.fov_rad
    partial = shard.with_name(f"{shard.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    np.save(partial / "images.npy", images)
    np.save(partial / "depth.npy", depth)
    np.save(partial / "extrinsics.npy", extrinsics)
    np.save(partial / "fov.npy", fov)
    partial.rename(shard)
    return shard


def main() -> None:
    """Render all shards of a pool, or one worker's share of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/pool"), help="folder of the pool")
    parser.add_argument(
        "--scenes", type=int, default=6016, help="how many, rounded up to shards of 64"
    )
    parser.add_argument("--frames", type=int, default=12, help="per scene (default: 12)")
    parser.add_argument("--first-seed", type=int, default=0, help="of the scenes (default: 0)")
    parser.add_argument("--worker", type=int, default=0, help="index of this process (default: 0)")
    parser.add_argument("--workers", type=int, default=1, help="number of processes (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shards = range(-(-options.scenes // SHARD_SCENES))[options.worker :: options.workers]
    with Progress() as progress:
        for index in progress.track(shards, description="shards"):
            render_shard(options.output, options.first_seed + index * SHARD_SCENES, options.frames)


if __name__ == "__main__":
    main()
