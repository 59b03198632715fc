"""Trajectory metrics after Sim(3) alignment: ATE, RPE, absolute rotation, scale drift.

Figures and statistics are those of evo (``evo_ape`` and ``evo_rpe`` with ``--align
--correct_scale``, RPE over consecutive frames): root mean squares, in the target's unit of length
and in degrees. `spark3r.metrics.alignment` defines them for trajectories that evo refuses (one
frame, no motion, collinear), and `TrajectoryMetrics.degenerate` names those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import camera_centres, check_shape, invert_pose
from .alignment import align_trajectories, is_still, umeyama
from .pose import rotation_angle_deg


@dataclass(frozen=True)
class TrajectoryMetrics:
    """Trajectory metrics of one clip, after Sim(3) alignment of the prediction.

    Attributes:
        ate: Root mean square distance of the camera centres, in the target's unit of length.
        extent: Root mean square distance of the target's centres from their centroid. For a target
            that moves, ``ate ÷ extent`` has no unit.
        rotation_deg: Mean angle between the camera orientations, degrees.
        rpe_translation: Root mean square error of the translation from frame to frame, target's
            unit of length.
        rpe_rotation_deg: Root mean square error of the rotation from frame to frame, degrees.
        scale: Scale of the alignment, target ÷ prediction.
        scale_drift: |log| of the ratio of the scales that align the last and the first half of the
            trajectory. None if a half has no motion, or the clip fewer than three frames.
        degenerate: Reason why part of the alignment is a convention, or None.
    """

    ate: float
    extent: float
    rotation_deg: float
    rpe_translation: float
    rpe_rotation_deg: float
    scale: float
    scale_drift: float | None
    degenerate: str | None = None


def scale_drift(predicted: Tensor, target: Tensor) -> float | None:
    """Return how much the scale of a trajectory changes along the clip.

    The first and the last half, which share the middle frame, are each aligned to the target by
    Sim(3). The drift is ``|log(scale of the last half ÷ scale of the first half)|``.

    Args:
        predicted: World-to-camera extrinsics ``[S, 3, 4]``.
        target: World-to-camera extrinsics ``[S, 3, 4]``.

    Returns:
        The drift (0.1 is about ten percent). It is None for fewer than three frames, and if there
        is a half in which a trajectory does not move or the two motions are uncorrelated.

    Raises:
        ValueError: If shapes are wrong or differ, or a value is NaN or infinite.
    """
    check_shape("predicted", predicted, (None, 3, 4))
    source, destination = camera_centres(predicted.double()), camera_centres(target.double())
    middle = len(source) // 2
    if len(source) < 3:
        return None
    scales = []
    for half in (slice(None, middle + 1), slice(middle, None)):
        if is_still(source[half]) or is_still(destination[half]):
            return None
        scales.append(float(umeyama(source[half], destination[half]).scale))
    if min(scales) <= 1e-12 * max(scales):
        return None
    return abs(math.log(scales[1] / scales[0]))


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def trajectory_metrics(predicted: Tensor, target: Tensor) -> TrajectoryMetrics:
    """Return ATE, RPE, absolute rotation and scale drift of one clip.

    Args:
        predicted: World-to-camera extrinsics ``[S, 3, 4]``.
        target: World-to-camera extrinsics ``[S, 3, 4]``.

    Returns:
        The metrics. For one frame RPE is 0, and `TrajectoryMetrics.degenerate` says so.

    Raises:
        ValueError: If shapes are wrong or differ, or a value is NaN or infinite.
    """
    alignment = align_trajectories(predicted, target)
    drift = scale_drift(predicted, target)
    target = target.double()
    aligned = alignment.similarity.apply_to_extrinsics(predicted)
    centres, target_centres = camera_centres(aligned), camera_centres(target)

    def steps(extrinsics: Tensor) -> Tensor:
        """Return the pose of each camera in the axes of the one before, ``[S - 1, 3, 4]``."""
        earlier, later = extrinsics[:-1], invert_pose(extrinsics)[1:]
        rotation = earlier[..., :3] @ later[..., :3]
        return torch.cat((rotation, earlier[..., :3] @ later[..., 3:] + earlier[..., 3:]), dim=-1)

    step, target_step = steps(aligned), steps(target)
    return TrajectoryMetrics(
        ate=_rms((centres - target_centres).norm(dim=-1)),
        extent=_rms((target_centres - target_centres.mean(dim=0)).norm(dim=-1)),
        rotation_deg=float(rotation_angle_deg(aligned[..., :3], target[..., :3]).mean()),
        rpe_translation=_rms((step[..., 3] - target_step[..., 3]).norm(dim=-1)),
        rpe_rotation_deg=_rms(rotation_angle_deg(step[..., :3], target_step[..., :3])),
        scale=float(alignment.similarity.scale),
        scale_drift=drift,
        degenerate=alignment.degenerate,
    )
