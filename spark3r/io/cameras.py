"""Camera files: a trajectory in TUM's format, and extrinsics and intrinsics as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..geometry import invert_pose, matrix_to_quaternion
from ..prediction import Prediction
from ..transform import Transform
from .clips import Footage

CONVENTION = (
    "extrinsics map world to camera, axes x right, y down, z forward (OpenCV); intrinsics in "
    "pixels of the depth maps, whose upper left corner is (0, 0); lengths in the model's own unit, "
    "or in that of known cameras; a pixel (x, y) of the original, turned upright, is (x, y) * "
    "scale + offset in the depth map"
)


def tum_lines(extrinsics: Tensor, times: Sequence[float]) -> list[str]:
    """Return camera-to-world poses as lines ``time x y z qx qy qz qw``.

    Args:
        extrinsics: World to camera, ``[S, 3, 4]``.
        times: Time of each frame, increasing.
    """
    pose = invert_pose(extrinsics.double())
    rows = zip(times, pose[:, :, 3].tolist(), matrix_to_quaternion(pose[:, :, :3]), strict=True)
    return [
        " ".join([f"{time:.6f}", *(f"{value:.9g}" for value in (*centre, *quaternion.tolist()))])
        for time, centre, quaternion in rows
    ]


def cameras_record(prediction: Prediction, footage: Footage) -> dict[str, Any]:
    """Return the cameras of a prediction as JSON, with each frame's depth file and original."""
    height, width = prediction.image_size
    frames = zip(footage.frames, footage.times, footage.transforms, strict=True)
    return {
        "convention": CONVENTION,
        "height": height,
        "width": width,
        "frames": [
            {
                "name": name,
                "time": time,
                "depth": f"depth/{number:05}.npy",
                "extrinsics": prediction.extrinsics[number].tolist(),
                "intrinsics": prediction.intrinsics[number].tolist(),
                "original": _original_record(transform, height, width),
            }
            for number, (name, time, transform) in enumerate(frames)
        ],
    }


def _original_record(transform: Transform, height: int, width: int) -> dict[str, Any]:
    """Return where a depth map ``[height, width]`` lies in the original, as JSON."""
    return {
        "height": transform.size[0],
        "width": transform.size[1],
        "orientation": transform.orientation,
        "scale": list(transform.scale),
        "offset": list(transform.offset),
        "crop": list(transform.crop(height, width)),
    }
