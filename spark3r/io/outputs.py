"""Files of a reconstruction: depth maps, cameras, a point cloud, and a record of the run.

DIR/depth/00000.npy        depth of each frame, [H, W] float32
DIR/confidence/00000.npy   its confidence, [H, W] float32
DIR/preview/00000.png      the frame beside its depth in colours
DIR/cameras.json           extrinsics and intrinsics of each frame, and its place in the original
DIR/trajectory.txt         camera poses in TUM's format
DIR/points.ply             coloured points, binary PLY
DIR/quality.csv            figures of each frame, and what is suspicious about it
DIR/run.json               model, schedule, duration, memory and deviation of the run

All of them but the arrays say what they were made from: command, weights, code and profile.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import Spark3rError
from ..metrics import frame_figures, suspects
from ..prediction import Prediction
from .cameras import cameras_record, tum_lines
from .clips import Footage
from .depth_maps import coloured_depth, depth_range
from .frame_table import FRAME_TABLE, write_frame_table
from .point_cloud import coloured_points, write_ply
from .provenance import provenance_lines

__all__ = [
    "LEAST_CONFIDENT_PERCENT",
    "MAX_POINTS",
    "new_folder",
    "refuse_folder",
    "refuse_full_disk",
    "write_outputs",
]

MAX_POINTS = 1_000_000
"""Default for the largest number of points of a cloud."""

LEAST_CONFIDENT_PERCENT = 40.0
"""Default share of pixels, the least confident ones, that a cloud leaves out."""


def write_outputs(
    folder: Path,
    footage: Footage,
    prediction: Prediction,
    run: Mapping[str, Any],
    *,
    max_points: int = MAX_POINTS,
    least_confident_percent: float = LEAST_CONFIDENT_PERCENT,
    mask: Tensor | None = None,
) -> dict[str, Any]:
    """Write every file of a reconstruction into an empty folder.

    Args:
        folder: An empty folder; see `new_folder`.
        footage: The footage.
        prediction: The model's prediction of it.
        run: Content of ``run.json``; ``points`` and ``suspects`` are added, the number of points
            and the frames that the reconstruction is probably wrong about. Its ``provenance``, if
            there is one, is in the other files too.
        max_points: Largest number of points of the cloud, default `MAX_POINTS`.
        least_confident_percent: Share of pixels that the cloud leaves out, 0 to below 100, default
            `LEAST_CONFIDENT_PERCENT`.
        mask: ``[S, H, W]`` bool, False where a pixel makes no point and its depth does not count;
            None takes all.

    Returns:
        The content of ``run.json``.

    Raises:
        Spark3rError: If a file cannot be written.
    """
    provenance: Mapping[str, Any] = run.get("provenance") or {}
    comments = list(provenance_lines(provenance))
    try:
        _write_frames(folder, footage.clip.images, prediction, comments)
        cameras = cameras_record(prediction, footage)
        _write_json(folder / "cameras.json", {**cameras, "provenance": provenance})
        lines = [f"# {line}" for line in comments]
        lines += tum_lines(prediction.extrinsics, footage.times)
        (folder / "trajectory.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        points, colours = coloured_points(
            prediction, footage.clip.images, max_points, least_confident_percent, mask
        )
        write_ply(folder / "points.ply", points, colours, comments)
        written = {
            **run,
            "points": len(points),
            "suspects": _write_suspects(
                folder, footage, prediction, mask, pinhole=run.get("pinhole", True)
            ),
        }
        _write_json(folder / "run.json", written)
    except OSError as error:
        reason = error.strerror or str(error)  # numpy's errors have their own text
        raise Spark3rError(
            f"the reconstruction cannot be written in {folder.parent} ({reason})"
        ) from error
    return written


def _write_frames(
    folder: Path, images: Tensor, prediction: Prediction, comments: Sequence[str]
) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if comments:
        info.add_text("Comment", "\n".join(comments))

    for part in ("depth", "confidence", "preview"):
        (folder / part).mkdir()
    near, far = depth_range(prediction.depth)
    frames = zip(images, prediction.depth, prediction.confidence, strict=True)
    for number, (image, depth, confidence) in enumerate(frames):
        _write_array(folder / f"depth/{number:05}.npy", depth)
        _write_array(folder / f"confidence/{number:05}.npy", confidence)
        colours = (image * 255).round().byte().permute(1, 2, 0).numpy()
        beside = np.concatenate([colours, coloured_depth(depth, near, far)], axis=1)
        Image.fromarray(beside).save(folder / f"preview/{number:05}.png", pnginfo=info)


def _write_suspects(
    folder: Path, footage: Footage, prediction: Prediction, mask: Tensor | None, *, pinhole: bool
) -> list[dict[str, Any]]:
    """Write the table of frames, and return those that are suspicious.

    Depths of frames are not compared with each other unless cameras are pinhole cameras.
    """
    depth = prediction.depth if mask is None else prediction.depth.masked_fill(~mask, math.nan)
    figures = frame_figures(
        footage.clip.images, depth, prediction.intrinsics, prediction.extrinsics
    )
    if not pinhole:
        unknown = torch.full_like(figures.joint, math.nan)
        figures = replace(figures, disagreement=unknown, joint=unknown)
    words = suspects(figures)
    write_frame_table(folder / FRAME_TABLE, footage.frames, figures, words)
    return [
        {"frame": number, "name": name, "suspected": list(each)}
        for number, (name, each) in enumerate(zip(footage.frames, words, strict=True))
        if each
    ]


def _write_array(path: Path, values: Tensor) -> None:
    content = io.BytesIO()  # writing to a file itself, NumPy does not say why it failed
    np.save(content, values.float().numpy())
    path.write_bytes(content.getvalue())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def refuse_folder(folder: Path) -> None:
    """Check that a new folder can be made, before minutes of work.

    Raises:
        Spark3rError: If the folder exists already, or its parent does not exist or is read-only.
    """
    parent = folder.absolute().parent
    try:
        exists = folder.exists() or folder.is_symlink()
    except OSError as error:  # a name that no folder can have
        raise Spark3rError(f"--output {folder} cannot be made ({error.strerror})") from error
    if exists:
        raise Spark3rError(f"--output {folder} exists already: choose another, or move it away")
    if not parent.is_dir():
        raise Spark3rError(f"--output {folder}: there is no folder {parent}")
    if not os.access(parent, os.W_OK):
        raise Spark3rError(f"--output {folder}: the folder {parent} is read-only")


def refuse_full_disk(folder: Path, images: Tensor) -> None:
    """Check that there is room for depth and confidence of a clip, before minutes of work.

    Args:
        folder: The folder that is to be made.
        images: The clip ``[S, 3, H, W]``.

    Raises:
        Spark3rError: If there is not.
    """
    frames, _, height, width = images.shape
    needed = frames * height * width * 2 * np.dtype(np.float32).itemsize
    free = shutil.disk_usage(folder.absolute().parent).free
    if free < needed:
        raise Spark3rError(
            f"--output {folder}: depth and confidence of {frames} frames take {needed / 1e6:.1f} "
            f"MB, and {free / 1e6:.1f} MB are free there: make room, or choose another place"
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Make a folder whole or not at all: the block writes to a sibling, which is then renamed.

    Args:
        folder: Path at which the folder appears when the block ends without an error; must not
            exist.

    Raises:
        Spark3rError: If it cannot be made, or somebody else made it in the meantime.
    """
    refuse_folder(folder)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    except OSError as error:
        raise Spark3rError(f"--output {folder} cannot be made ({error.strerror})") from error
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        refuse_folder(folder)
        try:
            partial.chmod(0o777 & ~mask)  # mkdtemp makes folders for their owner alone
            partial.rename(folder)
        except OSError as error:
            raise Spark3rError(f"--output {folder} cannot be made ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
