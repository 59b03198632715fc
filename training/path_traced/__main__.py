"""Render path-traced rooms: `python -m training.path_traced --library DIR --output DIR`.

Each room gives one clip of every size of `training.curriculum`, each along its own path. A shard
holds the clips of one size from some rooms. With `--clips` every room becomes a clip for validation
or judging instead: a folder with images, depth and poses, as `training.footage` reads it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bpy
import numpy as np
import torch
from mathutils.bvhtree import BVHTree
from torch import Tensor

from ..curriculum import SIZES
from ..scenes.paths import CameraPath, choose_path
from ..shards import encode_radiance, exposure, shard_name, write_shard
from . import seeds
from .catalogue import Catalogue, Model, read_catalogue
from .cycles import Lens, blender_pose, cast, prepare, render
from .furnish import furnish, rng_of
from .stage import Stage, empty_stage

SHARD_ROOMS = 4
NARROWEST, WIDEST = math.radians(45), math.radians(80)  # horizontal, of a sensor of 4:3
CLIP_SIZE = (168, 224)  # of clips for validation


@dataclass(frozen=True)
class RenderedClip:
    """F frames of one path.

    Attributes:
        radiance: Scene-linear, `[F, 3, H, W]`.
        depth: Along the optical axis, metres, inf for the sky, `[F, H, W]`.
        poses: Camera-to-world, OpenCV axes and world, float64 `[F, 3, 4]`.
        lens: The camera.
        seconds: CPU time of each frame's radiance and depth together.
    """

    radiance: np.ndarray
    depth: np.ndarray
    poses: Tensor
    lens: Lens
    seconds: float


def room_clips(
    seed: int, catalogue: Catalogue, sizes: Sequence[tuple[int, int]], times: Tensor, samples: int
) -> tuple[list[RenderedClip], list[Model]]:
    """Render clips of one room.

    Args:
        seed: The room.
        catalogue: What it is furnished with.
        sizes: Height and width of each clip's frames in pixels.
        times: Path times, float64 `[F]`.
        samples: Paths per rendered pixel.

    Returns:
        One clip for each size, and the models in the room.
    """
    rng = rng_of(seed)
    stage = empty_stage(rng, seed)
    place, used = furnish(stage, catalogue)
    tree, clips = stage.tree(), []
    for index, size in enumerate(sizes):
        path = choose_path(place, rng, lambda poses: _things_seen(stage, tree, poses))
        diagonal = 1.25 * math.tan(rng.uniform(NARROWEST, WIDEST) / 2)
        wide = size[1] * math.exp(rng.uniform(-0.06, 0.06))
        half = diagonal / math.hypot(wide, size[0])
        lens = Lens(size, (2 * math.atan(half * size[0]), 2 * math.atan(half * wide)))
        clips.append(_clip(path, times, lens, tree, samples, seed * 8 + index))
    return clips, used


def _clip(
    path: CameraPath, times: Tensor, lens: Lens, tree: BVHTree, samples: int, seed: int
) -> RenderedClip:
    """Render one path."""
    start = time.process_time()
    viewer = prepare(lens, samples, 1, seed)
    poses, rays = path.poses(times), lens.rays()
    radiance, depth = [], []
    for index, pose in enumerate(poses):
        there = blender_pose(pose)
        radiance.append(render(viewer, there, seed * 1000 + index))
        depth.append(cast(tree, there, rays)[0])
    seconds = (time.process_time() - start) / len(poses)
    return RenderedClip(np.stack(radiance), np.stack(depth), poses, lens, seconds)


def _things_seen(stage: Stage, tree: BVHTree, poses: Tensor) -> float:
    """Return how many things a view shows on average, 0 if one is too close."""
    line = np.linspace(-0.5, 0.5, 7)
    u, v = np.meshgrid(line, line)
    rays = np.stack([u, v, np.ones_like(u)], axis=-1)
    things = np.array([*stage.things, -1])
    total = 0
    for pose in poses:
        depth, face = cast(tree, blender_pose(pose), rays)
        if depth.min() < 0.3 or np.median(depth) < 0.7:
            return 0.0
        total += len(np.unique(things[face]))
    return total / len(poses)


def write_training_shards(
    first: int, catalogue: Catalogue, output: Path, frames: int, samples: int
) -> list[float]:
    """Render a shard of every size; return each clip's CPU seconds per frame.

    Args:
        first: Seed of the first of `SHARD_ROOMS` rooms.
        catalogue: What they are furnished with.
        output: Folder of the pool.
        frames: Frames per clip.
        samples: Paths per rendered pixel.

    Raises:
        ValueError: If a seed is not a training seed.
    """
    if first not in seeds.TRAINING:
        raise ValueError(f"seed {first} is not a training seed ({seeds.TRAINING})")
    sizes = list(SIZES)
    names = [shard_name("path", size, frames, first) for size in sizes]
    if all((output / name).exists() for name in names):
        return []
    rows: list[list[RenderedClip]] = []
    for seed in range(first, first + SHARD_ROOMS):
        generator = torch.Generator().manual_seed(seed)
        draw = torch.rand(frames, generator=generator, dtype=torch.float64)
        times = (torch.arange(frames, dtype=torch.float64) + draw) / frames
        clips, used = room_clips(seed, catalogue, sizes, times, samples)
        rows.append(clips)
        _credit(output, seed, used)
    for name, clips_of_size in zip(names, zip(*rows, strict=True), strict=True):
        codes = [encode_radiance(c.radiance * exposure(c.radiance)) for c in clips_of_size]
        poses = torch.stack([clip.poses for clip in clips_of_size])
        rotation = poses[..., :3].transpose(2, 3)
        extrinsics = torch.cat([rotation, -rotation @ poses[..., 3:]], dim=3)
        write_shard(
            output,
            name,
            np.stack(codes),
            np.stack([clip.depth for clip in clips_of_size]).astype(np.float16),
            extrinsics.numpy().astype(np.float32),
            np.array([clip.lens.fov for clip in clips_of_size], np.float32),
        )
    return [clip.seconds for clips in rows for clip in clips]


def write_clip(
    seed: int, catalogue: Catalogue, output: Path, frames: int, samples: int
) -> list[float]:
    """Render a room as a clip of even path times; return its CPU seconds per frame."""
    folder = output / str(seed)
    if (folder / "clip.npz").exists():
        return []
    folder.mkdir(parents=True, exist_ok=True)
    times = torch.linspace(0, 1, frames, dtype=torch.float64)
    (clip,), used = room_clips(seed, catalogue, [CLIP_SIZE], times, samples)
    level = exposure(clip.radiance)
    for index, view in enumerate(clip.radiance):
        _write_png(folder / f"{index:03d}.png", np.sqrt(np.clip(view * level, 0, 1)))
    poses = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
    poses[:, :3] = clip.poses.numpy()
    depth = clip.depth.astype(np.float32)
    np.savez_compressed(folder / "clip.npz", depth=depth, camera_to_world=poses)
    _credit(output, seed, used)
    return [clip.seconds]


def _write_png(path: Path, colours: np.ndarray) -> None:
    """Write `[3, H, W]` in [0, 1]; Blender's environment has no other image library."""
    _, height, width = colours.shape
    image = bpy.data.images.new("view", width, height)
    pixels = np.ones((height, width, 4), np.float32)
    pixels[..., :3] = colours.transpose(1, 2, 0)[::-1]
    image.pixels.foreach_set(pixels.ravel())
    image.filepath_raw, image.file_format = str(path), "PNG"
    image.save()
    bpy.data.images.remove(image)


def _credit(output: Path, seed: int, used: Sequence[Model]) -> None:
    """Name the creators of a room's models."""
    output.mkdir(parents=True, exist_ok=True)
    names = sorted({f"{m.name} by {m.creator} ({m.library})" for m in used})
    with (output / "credits.jsonl").open("a") as file:
        file.write(json.dumps({"seed": seed, "models": names}) + "\n")


def main() -> None:
    """Render all rooms, or one worker's share of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--library", type=Path, required=True, help="folder of the unzipped furniture libraries")
    add("--output", type=Path, default=Path("runs/pool"), help="folder of the pool or of clips")
    add("--rooms", type=int, default=400, help="how many (default: 400)")
    add("--first-seed", type=int, default=1000, help="of the rooms (default: 1000)")
    add("--frames", type=int, default=24, help="per clip (default: 24)")
    add("--samples", type=int, default=2, help="paths per rendered pixel (default: 2)")
    add("--clips", action="store_true", help="write clips for validation instead of shards")
    add("--worker", type=int, default=0, help="index of this process (default: 0)")
    add("--workers", type=int, default=1, help="number of processes (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    catalogue = read_catalogue(options.library)
    step, write = (1, write_clip) if options.clips else (SHARD_ROOMS, write_training_shards)
    starts = range(options.first_seed, options.first_seed + options.rooms, step)
    for first in starts[options.worker :: options.workers]:
        seconds = write(first, catalogue, options.output, options.frames, options.samples)
        if seconds:
            mean = sum(seconds) / len(seconds)
            print(f"rooms from {first}: {mean:.2f} CPU s per frame", flush=True)


if __name__ == "__main__":
    main()
