"""Sim(3) alignment: of corresponding points, and of camera trajectories.

evo and most evaluations refuse trajectories that leave the alignment undetermined. Here they have a
defined alignment, and `Alignment.degenerate` says so:

- With one frame, or with cameras that do not move in either trajectory, the rotation follows the
  cameras' orientations, the scale is 1 and the centroids are matched. So a collapsed prediction has
  the ATE of a point.
- With collinear cameras (two cameras always are), the line is aligned, and the roll about it
  follows the orientations.

In other footage the cameras hardly move compared with their noise (a pan). Scale and rotation then
follow the noise. `TrajectoryMetrics.extent` is small for such clips. Relative pose errors
(`spark3r.metrics.pose`) are not affected, and `umeyama` of corresponding points can align points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import camera_centres, check_finite, check_shape, invert_pose

# Largest spread of camera centres that do not move (in world units, and relative to their distance
# from the origin), and largest ratio of the second to the first principal extent of centres on a
# line. Both are well above the rounding noise of float32 poses.
NO_MOTION = 1e-6
COLLINEAR = 1e-5


@dataclass(frozen=True)
class Similarity:
    """A Sim(3) transform ``x ↦ scale · rotation x + translation``.

    Attributes:
        scale: Factor, ``[...]`` float64.
        rotation: Rotation matrix, ``[..., 3, 3]`` float64.
        translation: Vector, ``[..., 3]`` float64.
    """

    scale: Tensor
    rotation: Tensor
    translation: Tensor

    @classmethod
    def identity(cls, device: torch.device | None = None) -> Similarity:
        """Return the transform that changes nothing."""
        one = torch.ones((), dtype=torch.float64, device=device)
        return cls(one, torch.eye(3, dtype=torch.float64, device=device), one.new_zeros(3))

    def apply(self, points: Tensor) -> Tensor:
        """Return transformed points.

        Args:
            points: Points ``[..., N, 3]``.

        Returns:
            ``[..., N, 3]`` float64.
        """
        rotated = points.double() @ self.rotation.transpose(-1, -2)
        return self.scale[..., None, None] * rotated + self.translation[..., None, :]

    def apply_to_extrinsics(self, extrinsics: Tensor) -> Tensor:
        """Return moved cameras: centres move as points, orientations by the rotation.

        Args:
            extrinsics: World-to-camera extrinsics ``[..., S, 3, 4]``.

        Returns:
            ``[..., S, 3, 4]`` world to camera, float64.
        """
        camera_to_world = invert_pose(extrinsics.double())
        rotation = self.rotation[..., None, :, :] @ camera_to_world[..., :3]
        centres = self.apply(camera_to_world[..., 3])
        return invert_pose(torch.cat((rotation, centres[..., None]), dim=-1))


@dataclass(frozen=True)
class Alignment:
    """A Sim(3) alignment of two trajectories.

    Attributes:
        similarity: Transform from the predicted world to the target's.
        degenerate: Reason why part of it is a convention, or None.
    """

    similarity: Similarity
    degenerate: str | None = None


def _nearest_rotation(covariance: Tensor) -> Tensor:
    """Return the rotation R that maximises ⟨covariance, R⟩, ``[..., 3, 3]``."""
    u, _, vh = torch.linalg.svd(covariance)
    sign = torch.where(torch.linalg.det(u) * torch.linalg.det(vh) < 0, -1.0, 1.0).to(u.dtype)
    last = torch.stack((torch.ones_like(sign), torch.ones_like(sign), sign), dim=-1)
    return (u * last[..., None, :]) @ vh


def _similarity(
    source: Tensor, target: Tensor, rotation: Tensor | None, fixed_scale: bool
) -> Similarity:
    """Return the best scale and translation, and rotation unless given, for ``[..., N, 3]``."""
    mean_source, mean_target = source.mean(dim=-2), target.mean(dim=-2)
    centred = source - mean_source[..., None, :]
    covariance = (target - mean_target[..., None, :]).transpose(-1, -2) @ centred
    if rotation is None:
        rotation = _nearest_rotation(covariance)
    # ⟨covariance, R⟩ is tr(D S) of Umeyama's eq. 42 for his R, and right for any other R too.
    numerator = (covariance * rotation).sum(dim=(-1, -2))
    denominator = centred.square().sum(dim=(-1, -2))
    one = torch.ones_like(denominator)
    if fixed_scale:
        scale = one
    else:
        scale = torch.where(
            denominator > 0, numerator / torch.where(denominator > 0, denominator, one), one
        )
    moved = (rotation @ mean_source[..., None]).squeeze(-1)
    return Similarity(scale, rotation, mean_target - scale[..., None] * moved)


def umeyama(source: Tensor, target: Tensor) -> Similarity:
    """Return the least-squares similarity of corresponding points (Umeyama, PAMI 1991, eq. 40-42).

    Coinciding source points have scale 1. For collinear points several rotations are best, and
    which one is returned is unspecified; `align_trajectories` decides by the cameras' orientations.

    Args:
        source: Points ``[..., N, 3]``.
        target: Points ``[..., N, 3]``.

    Returns:
        The transform from source to target, float64.

    Raises:
        ValueError: If shapes are wrong or differ, N is 0, or a value is NaN or infinite.
    """
    check_shape("source", source, (None, 3))
    if source.shape != target.shape:
        raise ValueError(f"target: expected shape {list(source.shape)}, found {list(target.shape)}")
    if source.shape[-2] == 0:
        raise ValueError("umeyama: no points")
    check_finite("source", source)
    check_finite("target", target)
    return _similarity(source.double(), target.double(), None, fixed_scale=False)


def _extents(centres: Tensor) -> tuple[float, float]:
    """Return first and second principal extent (singular values) of centres ``[S, 3]``."""
    values = torch.linalg.svdvals(centres - centres.mean(dim=0))
    padded = [*values.tolist(), 0.0]
    return padded[0], padded[1]


def is_still(centres: Tensor) -> bool:
    """Return True if camera centres ``[S, 3]`` differ by no more than rounding noise."""
    reach = max(1.0, float(centres.norm(dim=-1).max()))
    return _extents(centres)[0] <= NO_MOTION * reach * math.sqrt(centres.shape[0])


def align_trajectories(predicted: Tensor, target: Tensor) -> Alignment:
    """Return the Sim(3) alignment of two camera trajectories, defined for degenerate ones too.

    Args:
        predicted: World-to-camera extrinsics ``[S, 3, 4]``.
        target: World-to-camera extrinsics ``[S, 3, 4]``.

    Returns:
        The alignment of the predicted world with the target's.

    Raises:
        ValueError: If shapes are wrong or differ, or a value is NaN or infinite.
    """
    if predicted.dim() != 3 or predicted.shape[1:] != (3, 4) or predicted.shape[0] == 0:
        raise ValueError(f"predicted: expected [S, 3, 4], found {list(predicted.shape)}")
    if predicted.shape != target.shape:
        raise ValueError(
            f"target: expected shape {list(predicted.shape)}, found {list(target.shape)}"
        )
    check_finite("predicted", predicted)
    check_finite("target", target)
    predicted, target = predicted.double(), target.double()
    source, destination = camera_centres(predicted), camera_centres(target)
    # Σ of target orientation × predicted orientation⁻¹ (camera to world).
    orientation = (target[..., :3].transpose(-1, -2) @ predicted[..., :3]).sum(dim=0)

    still = [
        name
        for name, centres in (("target's", destination), ("predicted", source))
        if is_still(centres)
    ]
    if still:
        reason = (
            "one frame" if len(source) == 1 else f"the {' and '.join(still)} cameras do not move"
        )
        rotation = _nearest_rotation(orientation)
        return Alignment(_similarity(source, destination, rotation, fixed_scale=True), reason)

    on_a_line = [
        name
        for name, centres in (("target's", destination), ("predicted", source))
        if (extents := _extents(centres))[1] <= COLLINEAR * extents[0]
    ]
    if not on_a_line:
        return Alignment(umeyama(source, destination))
    # Only the direction of the line counts. Orientations decide the roll about it, at a weight that
    # is too small to turn the line itself.
    centred = destination - destination.mean(dim=0)
    u, s, vh = torch.linalg.svd(centred.T @ (source - source.mean(dim=0)))
    line = u[:, :1] @ vh[:1] + 1e-8 * orientation / len(source)
    rotation = _nearest_rotation(line if float(s[0]) > 0 else orientation)
    return Alignment(
        _similarity(source, destination, rotation, fixed_scale=False),
        f"the {' and '.join(on_a_line)} cameras lie on a line: roll about it from orientations",
    )
