"""Camera files: a trajectory in TUM's format, and extrinsics and intrinsics as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..geometry import invert_pose, matrix_to_quaternion
from ..prediction import Prediction

CONVENTION = (
    "extrinsics map world to camera, axes x right, y down, z forward (OpenCV); intrinsics in "
    "pixels of the depth maps, whose upper left corner is (0, 0); lengths in the model's own unit"
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


def cameras_record(
    prediction: Prediction, names: Sequence[str], times: Sequence[float]
) -> dict[str, Any]:
    """Return the cameras of a prediction as JSON, with the depth file of each frame."""
    height, width = prediction.image_size
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
            }
            for number, (name, time) in enumerate(zip(names, times, strict=True))
        ],
    }
