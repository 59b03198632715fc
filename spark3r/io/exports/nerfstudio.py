"""nerfstudio's ``transforms.json``, with the depth of every frame.

Source of the format: https://docs.nerf.studio/quickstart/data_conventions.html. The world is that
of the reconstruction; cameras have OpenGL axes (x right, y up, z backward), as nerfstudio asks.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..reading import Output
from .tracks import Cameras

__all__ = ["DEPTH_UNITS", "write_transforms"]

DEPTH_UNITS = 1000
"""Depth files are in thousandths of the model's unit: nerfstudio multiplies them by .001."""

_FROM_OPENCV = np.diag([1.0, -1.0, -1.0])


def write_transforms(
    folder: Path, output: Output, cameras: Cameras, names: Sequence[str], cloud: str | None = None
) -> None:
    """Write ``transforms.json``, and ``depths/00000.npy`` of each frame.

    Depth files are float32 and show the whole original at the scale of the depth map; a pixel that
    the model did not see is 0.

    Args:
        folder: An existing folder, with the images in ``images/``.
        output: The reconstruction.
        cameras: Its cameras at the size of the images.
        names: Name of each image file.
        cloud: Name of a PLY file in the folder with points to begin from; None for none.
    """
    depths = folder / "depths"
    depths.mkdir()
    frames = []
    for number, name in enumerate(names):
        content = io.BytesIO()  # writing to a file itself, NumPy does not say why it failed
        np.save(content, output.original_depth(number).numpy() * np.float32(DEPTH_UNITS))
        (depths / f"{number:05}.npy").write_bytes(content.getvalue())
        height, width = cameras.sizes[number]
        matrix, pose = cameras.intrinsics[number], np.eye(4)
        pose[:3, :3] = cameras.extrinsics[number, :, :3].T @ _FROM_OPENCV
        pose[:3, 3] = cameras.centres[number]
        frames.append(
            {
                "file_path": f"images/{name}",
                "depth_file_path": f"depths/{number:05}.npy",
                "w": width,
                "h": height,
                "fl_x": float(matrix[0, 0]),
                "fl_y": float(matrix[1, 1]),
                "cx": float(matrix[0, 2]),
                "cy": float(matrix[1, 2]),
                "transform_matrix": pose.tolist(),
            }
        )
    document = {"camera_model": "OPENCV", "frames": frames}
    if cloud is not None:
        document["ply_file_path"] = cloud
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    (folder / "transforms.json").write_text(text, encoding="utf-8")
