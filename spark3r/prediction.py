"""A model's prediction of one clip, in the same form for every family."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import reduce

import torch
from torch import Tensor

from .errors import Spark3rError
from .geometry import PIXEL_CENTRE, decode_pose, invert_pose, pixel_grid, unproject

# Largest entry of |R Rᵀ - 1| that still counts as a rotation: cameras computed in bfloat16 pass,
# a transposed or scaled matrix does not.
ROTATION_TOLERANCE = 0.02


class PredictionError(Spark3rError, ValueError):
    """A model's outputs do not form a prediction: wrong shape, NaN, or no camera matrix."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """Depth, cameras and points of one clip (one batch element), checked on construction.

    Tensors on the meta device have no values, and those are not checked.

    Attributes:
        depth: ``[S, H, W]``, z-coordinate in the camera.
        confidence: ``[S, H, W]``, larger is more confident; the range depends on the family.
        extrinsics: ``[S, 3, 4]``, world to camera, OpenCV axes.
        intrinsics: ``[S, 3, 3]`` in pixels.
        points: ``[S, H, W, 3]`` in world coordinates.

    Raises:
        PredictionError: If a tensor has the wrong shape, is not floating point, lies on another
            device, holds NaN or infinity, or an extrinsic matrix has no rotation in it.
    """

    depth: Tensor
    confidence: Tensor
    extrinsics: Tensor
    intrinsics: Tensor
    points: Tensor

    def __post_init__(self) -> None:
        if self.depth.dim() != 3 or 0 in self.depth.shape:
            raise PredictionError(
                f"depth has shape {list(self.depth.shape)}, expected [S, H, W] of one clip; "
                "take one element of the batch"
            )
        frames, height, width = self.depth.shape
        expected = {
            "depth": (frames, height, width),
            "confidence": (frames, height, width),
            "extrinsics": (frames, 3, 4),
            "intrinsics": (frames, 3, 3),
            "points": (frames, height, width, 3),
        }
        for name, shape in expected.items():
            value: Tensor = getattr(self, name)
            if tuple(value.shape) != shape:
                raise PredictionError(
                    f"{name} has shape {list(value.shape)}, expected {list(shape)} to go with "
                    f"depth {list(self.depth.shape)}"
                )
            if not value.is_floating_point():
                raise PredictionError(f"{name} is {value.dtype}, expected floating point")
            if value.device != self.depth.device:
                raise PredictionError(
                    f"{name} is on {value.device}, depth on {self.depth.device}; move one of them"
                )
            bad = (~torch.isfinite(value)).sum()
            if not value.is_meta and bad:
                raise PredictionError(
                    f"{name}: {int(bad)} of {value.numel()} values are NaN or infinite; if the "
                    "model ran in half precision, try float32 or bfloat16"
                )
        _check_rotations(self.extrinsics[..., :3])

    @property
    def frames(self) -> int:
        """Number of frames S."""
        return self.depth.shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.depth.shape[1], self.depth.shape[2]

    def to(self, device: torch.device | str) -> Prediction:
        """Return the prediction on a device; the same object if it is there already."""
        if self.depth.device == torch.device(device):
            return self
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def select(self, index: Tensor | slice) -> Prediction:
        """Return the prediction of some frames only, in the order given."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @classmethod
    def from_depth(
        cls,
        depth: Tensor,
        confidence: Tensor,
        extrinsics: Tensor,
        intrinsics: Tensor,
        points: Tensor | None = None,
        *,
        pixel_centre: float = PIXEL_CENTRE,
    ) -> Prediction:
        """Make a prediction from depth and camera matrices, as Depth-Anything-3 returns them.

        Args:
            depth: ``[S, H, W]`` or ``[S, H, W, 1]``.
            confidence: ``[S, H, W]`` or ``[S, H, W, 1]``.
            extrinsics: ``[S, 3, 4]`` or ``[S, 4, 4]``, world to camera.
            intrinsics: ``[S, 3, 3]`` in pixels.
            points: ``[S, H, W, 3]`` from a point head; None unprojects the depth.
            pixel_centre: Offset of the sampled point inside a pixel when unprojecting, default 0.5;
                VGGT's own code uses 0.

        Returns:
            The prediction, in float32 or wider.

        Raises:
            PredictionError: If the tensors do not describe one clip.
        """
        depth, confidence, extrinsics, intrinsics = _widened(
            _drop_channel(depth), _drop_channel(confidence), extrinsics[..., :3, :], intrinsics
        )
        if points is None:
            try:
                points = unproject(depth, intrinsics, extrinsics, pixel_centre=pixel_centre)
            except (ValueError, RuntimeError) as error:  # RuntimeError: S differs, or K is singular
                raise PredictionError(
                    f"cannot unproject depth {list(depth.shape)} with extrinsics "
                    f"{list(extrinsics.shape)} and intrinsics {list(intrinsics.shape)}: {error}"
                ) from error
        return cls(*_widened(depth, confidence, extrinsics, intrinsics, points))

    @classmethod
    def from_pose_encoding(
        cls,
        depth: Tensor,
        confidence: Tensor,
        pose_encoding: Tensor,
        points: Tensor | None = None,
        *,
        pixel_centre: float = PIXEL_CENTRE,
    ) -> Prediction:
        """Make a prediction from depth and pose encodings, as VGGT and VGGT-Omega return them.

        Args:
            depth: ``[S, H, W]`` or ``[S, H, W, 1]``.
            confidence: ``[S, H, W]`` or ``[S, H, W, 1]``.
            pose_encoding: ``[S, 9]``, camera from world (`spark3r.geometry`).
            points: ``[S, H, W, 3]`` from a point head; None unprojects the depth.
            pixel_centre: As in `from_depth`.

        Returns:
            The prediction, in float32 or wider.

        Raises:
            PredictionError: If the tensors do not describe one clip.
        """
        depth = _drop_channel(depth)
        if depth.dim() != 3 or pose_encoding.shape != (depth.shape[0], 9):
            raise PredictionError(
                f"depth has shape {list(depth.shape)} and pose_encoding "
                f"{list(pose_encoding.shape)}, expected [S, H, W] and [S, 9] of one clip"
            )
        extrinsics, intrinsics = decode_pose(pose_encoding, (depth.shape[1], depth.shape[2]))
        return cls.from_depth(
            depth, confidence, extrinsics, intrinsics, points, pixel_centre=pixel_centre
        )

    @classmethod
    def from_local_points(
        cls,
        local_points: Tensor,
        confidence: Tensor,
        camera_to_world: Tensor,
    ) -> Prediction:
        """Make a prediction from points in camera coordinates, as π³ returns them.

        π³ predicts no intrinsics. They are fitted for each frame, fx and fy separately, with the
        principal point at the image centre: least squares of ``fx · x ÷ z`` against ``u - W ÷ 2``.

        Args:
            local_points: ``[S, H, W, 3]``, OpenCV axes of each camera.
            confidence: ``[S, H, W]`` or ``[S, H, W, 1]``.
            camera_to_world: ``[S, 3, 4]`` or ``[S, 4, 4]``.

        Returns:
            The prediction, in float32 or wider.

        Raises:
            PredictionError: If the tensors do not describe one clip.
        """
        local_points, pose, confidence = _widened(
            local_points, camera_to_world[..., :3, :], _drop_channel(confidence)
        )
        if local_points.dim() != 4 or pose.shape != (local_points.shape[0], 3, 4):
            raise PredictionError(
                f"local_points has shape {list(local_points.shape)} and camera_to_world "
                f"{list(camera_to_world.shape)}, expected [S, H, W, 3] and [S, 3, 4] or [S, 4, 4]"
            )
        intrinsics = _fit_intrinsics(local_points)
        points = local_points @ pose[:, None, :, :3].transpose(-1, -2) + pose[:, None, None, :, 3]
        return cls(local_points[..., 2], confidence, invert_pose(pose), intrinsics, points)


def _widened(*values: Tensor) -> list[Tensor]:
    """Return tensors in the widest of their precisions, float32 or wider."""
    widest = reduce(torch.promote_types, (value.dtype for value in values), torch.float32)
    return [value.to(widest) for value in values]


def _drop_channel(value: Tensor) -> Tensor:
    return value.squeeze(-1) if value.dim() == 4 and value.shape[-1] == 1 else value


def _check_rotations(rotation: Tensor) -> None:
    rotation = rotation.double()
    identity = torch.eye(3, dtype=rotation.dtype, device=rotation.device)
    error = (rotation @ rotation.transpose(-1, -2) - identity).abs().amax(dim=(-1, -2))
    wrong = (error > ROTATION_TOLERANCE) | (torch.linalg.det(rotation) < 0)
    if not wrong.is_meta and bool(wrong.any()):
        frame = int(wrong.nonzero()[0])
        raise PredictionError(
            f"extrinsics of frame {frame} (and {int(wrong.sum()) - 1} more): the left 3×3 block is "
            f"not a rotation (|R Rᵀ - 1| up to {float(error[frame]):.3g})"
        )


def _fit_intrinsics(local_points: Tensor) -> Tensor:
    """Return intrinsics ``[S, 3, 3]`` fitted to points in front of the camera."""
    frames, height, width, _ = local_points.shape
    depth = local_points[..., 2:]
    in_front = depth > 0
    slope = torch.where(
        in_front,
        local_points[..., :2] / torch.where(in_front, depth, torch.ones_like(depth)),
        torch.zeros_like(local_points[..., :2]),
    )
    centre = local_points.new_tensor([width / 2, height / 2])
    offset = pixel_grid(height, width, like=local_points)[..., :2]
    offset = offset - centre
    focal = (slope * offset).sum(dim=(1, 2)) / slope.square().sum(dim=(1, 2))
    intrinsics = torch.zeros(frames, 3, 3, dtype=focal.dtype, device=focal.device)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = focal[:, 0], focal[:, 1]
    intrinsics[:, :2, 2] = centre
    intrinsics[:, 2, 2] = 1
    return intrinsics
