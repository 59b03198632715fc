"""Real and path-traced footage with ground truth, and how well a model reconstructs it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spark3r.clips import Clip
from spark3r.families.parts.preprocessing import balanced
from spark3r.geometry import decode_pose, invert_pose
from spark3r.metrics import depth_metrics, pose_metrics
from spark3r.reference.model import PATCH_SIZE, ReferenceModel

RESOLUTION = 64  # side of the square that has as many patches as any frame
KITCHEN_STARTS = (0, 200, 400, 600)
KITCHEN_FRAMES, KITCHEN_STEP = 48, 4
# Focal lengths of the Kinect's cameras at 640x480. The baseline between them is left aside.
COLOUR_FOCAL, DEPTH_FOCAL, KINECT_WIDTH = 525.0, 585.0, 640


@dataclass(frozen=True)
class FootageScores:
    """Scores of one clip, or means over clips; poses of all pairs of frames."""

    auc_30: float
    rotation_deg: float  # median
    translation_deg: float  # median
    abs_rel: float  # one median scale per clip
    delta_125: float


def read_room(folder: Path) -> Clip:
    """Read a path-traced clip.

    Args:
        folder: Folder with `clip.npz`, and `000.png` and so on, which may lie in `frames`. The
            archive holds `depth` `[S, h, w]` in metres, inf for the sky, and `camera_to_world`
            `[S, 4, 4]`.

    Returns:
        The clip at the model's resolution.
    """
    with np.load(folder / "clip.npz") as file:
        depth = torch.from_numpy(file["depth"]).float()
        poses = torch.from_numpy(file["camera_to_world"]).double()
    frames = folder / "frames" if (folder / "frames").is_dir() else folder
    images = _images([frames / f"{index:03d}.png" for index in range(len(poses))])
    height, width = images.shape[-2:]
    rows = _centres(height, depth.shape[1], depth.shape[1] / height)
    columns = _centres(width, depth.shape[2], depth.shape[2] / width)
    return Clip(
        name=folder.name,
        images=images,
        depth=depth[:, rows[:, None], columns],
        extrinsics=invert_pose(poses[:, :3]).float(),
    )


def read_kitchen(folder: Path, start: int) -> Clip:
    """Read a stretch of the Kinect's recording of a kitchen.

    Args:
        folder: Folder with `frames/0000.jpg` and so on, `poses.json`, and `depth.npz` with depth
            maps of some of the frames in millimetres, as the depth camera sees them.
        start: First frame.

    Returns:
        Every 4th of 192 frames, at the model's resolution. Depth is looked up where the colour
        camera's pixels see it, and is NaN where it is not known.
    """
    chosen = range(start, start + KITCHEN_FRAMES * KITCHEN_STEP, KITCHEN_STEP)
    recorded = json.loads((folder / "poses.json").read_text())["camera_to_world"]
    poses = torch.tensor([recorded[index] for index in chosen], dtype=torch.float64)
    images = _images([folder / "frames" / f"{index:04d}.jpg" for index in chosen])
    height, width = images.shape[-2:]
    with np.load(folder / "depth.npz") as file:
        known = dict(zip(file["frames"].tolist(), file["depth_mm"], strict=True))
    depth = torch.full((len(chosen), height, width), torch.nan)
    for row, index in enumerate(chosen):
        if index in known:
            metres = torch.from_numpy(known[index].astype(np.float32) / 1000)
            depth[row] = _as_colour_sees(metres, height, width)
    return Clip(
        name=f"kitchen {start}",
        images=images,
        depth=depth,
        extrinsics=invert_pose(poses[:, :3]).float(),
    )


def _as_colour_sees(depth: Tensor, height: int, width: int) -> Tensor:
    """Look up the depth camera's map `[h, w]` at the colour camera's pixels; NaN if unknown."""
    full_height, full_width = depth.shape
    zoom = DEPTH_FOCAL / COLOUR_FOCAL
    rows = _centres(height, full_height, full_height / height * zoom)
    columns = _centres(width, full_width, full_width / width * zoom)
    inside = ((rows >= 0) & (rows < full_height))[:, None]
    inside = inside & (columns >= 0) & (columns < full_width)
    rows, columns = rows.clamp(0, full_height - 1), columns.clamp(0, full_width - 1)
    looked_up = depth[rows[:, None], columns]
    return torch.where(inside & (looked_up > 0), looked_up, torch.nan)


def _centres(count: int, full: int, spacing: float) -> Tensor:
    """Return the pixels, of a line of `full`, in which evenly spaced centres lie; int64."""
    places = (torch.arange(count, dtype=torch.float64) + 0.5 - count / 2) * spacing + full / 2
    return places.floor().long()


def _images(files: list[Path]) -> Tensor:
    """Read images as the model's family preprocesses them, `[S, 3, H, W]`."""
    opened = (Image.open(file).convert("RGB") for file in files)
    return balanced(opened, resolution=RESOLUTION, patch=PATCH_SIZE).images


@torch.inference_mode()
def score_footage(model: ReferenceModel, clip: Clip) -> FootageScores:
    """Score a model on a clip, all frames at once.

    Args:
        model: The model.
        clip: The clip, with extrinsics and depth; depth that is not finite is not scored.

    Returns:
        The scores.

    Raises:
        ValueError: If the clip has no ground truth.
    """
    if clip.depth is None or clip.extrinsics is None:
        raise ValueError(f"clip {clip.name} has no ground truth")
    device = next(model.parameters()).device
    predictions = model(clip.images.to(device))
    size = (clip.images.shape[2], clip.images.shape[3])
    extrinsics, _ = decode_pose(predictions["pose_enc"][0].cpu(), size)
    pose = pose_metrics(extrinsics, clip.extrinsics)
    depth = depth_metrics(predictions["depth"][0, ..., 0].cpu(), clip.depth, align="clip")
    return FootageScores(
        auc_30=pose.auc_30,
        rotation_deg=pose.rotation_deg,
        translation_deg=pose.translation_deg,
        abs_rel=depth.abs_rel,
        delta_125=depth.delta_125,
    )


def mean_scores(scores: list[FootageScores]) -> FootageScores:
    """Return the means over clips."""
    rows = [asdict(row) for row in scores]
    return FootageScores(**{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]})


def read_rooms(folder: Path) -> list[Clip]:
    """Read every path-traced clip whose folder lies in a folder, in the order of their names."""
    paths = sorted((path.parent for path in folder.glob("*/clip.npz")), key=_order)
    return [read_room(path) for path in paths]


def _order(path: Path) -> tuple[int, str]:
    return (int(path.name) if path.name.isdigit() else -1, path.name)
