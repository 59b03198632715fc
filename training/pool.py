"""Render a pool of training clips to disk: `python -m training.pool --output DIR`.

Clips come from the generator of rooms and places (`v2`) or from the old one (`v1`), which the
shipped weights were trained on. `training.path_traced` adds shards of path-traced rooms.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from spark3r.reference.scenes import render as old_render
from spark3r.reference.scenes import scene as old_scene
from spark3r.reference.scenes.seeds import TRAINING

from .curriculum import SIZES
from .scenes.render import field_of_view, render_path
from .scenes.scene import random_scene
from .shards import encode_radiance, exposure, shard_name, write_shard

SHARD_SCENES = 64
OLD_SIZE = (64, 64)  # the only size of clips from the old generator


def draw_path_times(seed: int, frames: int) -> Tensor:
    """Return random path times of a training clip, float64 `[frames]`, in increasing order.

    Two clips in three cover the whole path. The others cover a shorter or longer stretch of it, so
    that gaps of every size between frames occur.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(frames + 2, generator=generator, dtype=torch.float64)
    u = (torch.arange(frames, dtype=torch.float64) + draw[2:]) / frames
    return u if draw[0] < 2 / 3 else u * (0.2 * 7.0 ** draw[1])


def shard_size(source: str, first_seed: int) -> tuple[int, int]:
    """Return height and width of a shard's frames, which follow from its first seed."""
    if source == "v1":
        return OLD_SIZE
    draw = random.Random(first_seed)
    return draw.choices(list(SIZES), list(SIZES.values()))[0]


def render_shard(
    output: Path,
    source: str,
    first_seed: int,
    frames: int,
    size: tuple[int, int],
    scenes: int = SHARD_SCENES,
) -> Path:
    """Render the clips of consecutive seeds into one folder.

    Args:
        output: Folder of the pool.
        source: Generator, "v1" or "v2".
        first_seed: Seed of the first scene. All seeds of the shard must be training seeds.
        frames: Frames per scene, F.
        size: Height and width of a frame in pixels.
        scenes: Number of scenes, n.

    Returns:
        The shard's folder. It is written completely or not at all.

    Raises:
        ValueError: If a seed is not a training seed.
    """
    if first_seed not in TRAINING or first_seed + scenes - 1 not in TRAINING:
        raise ValueError(f"seeds from {first_seed} on are not training seeds ({TRAINING})")
    name = shard_name(source, size, frames, first_seed)
    if (output / name).exists():
        return output / name
    images = np.empty((scenes, frames, 3, *size), np.uint8)
    depth = np.empty((scenes, frames, *size), np.float16)
    extrinsics = np.empty((scenes, frames, 3, 4), np.float32)
    fov = np.empty((scenes, 2), np.float32)
    for row in range(scenes):
        seed = first_seed + row
        u = draw_path_times(seed, frames)
        if source == "v1":
            old = old_scene.random_scene(seed)
            colours, z, cameras = old_render.render_path(old, u, *size)
            images[row], fov[row] = encode_radiance(colours.square().numpy()), old.fov_rad
        else:
            scene = random_scene(seed)
            radiance, z, cameras = render_path(scene, u, *size)
            radiance *= exposure(radiance.numpy())
            images[row] = encode_radiance(radiance.numpy())
            fov[row] = field_of_view(scene, *size)
        depth[row], extrinsics[row] = z.numpy(), cameras.numpy()
    return write_shard(output, name, images, depth, extrinsics, fov)


def main() -> None:
    """Render all shards of a pool, or one worker's share of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/pool"), help="folder of the pool")
    add("--source", choices=("v1", "v2"), default="v2", help="generator (default: v2)")
    add("--scenes", type=int, default=6016, help="how many, rounded up to shards of 64")
    add("--frames", type=int, default=12, help="per scene (default: 12)")
    add("--first-seed", type=int, default=0, help="of the scenes (default: 0)")
    add("--worker", type=int, default=0, help="index of this process (default: 0)")
    add("--workers", type=int, default=1, help="number of processes (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shards = range(-(-options.scenes // SHARD_SCENES))[options.worker :: options.workers]
    with Progress() as progress:
        for index in progress.track(shards, description="shards"):
            first = options.first_seed + index * SHARD_SCENES
            size = shard_size(options.source, first)
            render_shard(options.output, options.source, first, options.frames, size)


if __name__ == "__main__":
    main()
