"""Trajectory metrics after Sim(3) alignment: ATE, RPE, absolute rotation, scale drift.

Figures and statistics are those of evo (``evo_ape`` and ``evo_rpe`` with ``--align
--correct_scale``, RPE over consecutive frames): root mean squares, in the target's unit of length
and in degrees. Trajectories that evo refuses (one frame, no motion, collinear) are defined in
`spark3r.metrics.alignment` and named in `TrajectoryMetrics.degenerate`.
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
        extent: Root mean square distance of the target's centres from their centroid; ``ate ÷
            extent`` is free of units where the target moves.
        rotation_deg: Mean angle between the camera orientations, degrees.
        rpe_translation: Root mean square error of the translation from frame to frame, target's
            unit of length.
        rpe_rotation_deg: Root mean square error of the rotation from frame to frame, degrees.
        scale: Scale of the alignment, target ÷ prediction.
        scale_drift: |log| of the ratio of the scales that align the last and the first half of the
            trajectory; None where a half has no motion (or the clip fewer than three frames).
        degenerate: Why part of the alignment is a convention, or None.
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
    """How much the scale of a trajectory changes along the clip.

    The first and the last half (sharing the middle frame) are Sim(3)-aligned to the target each on
    its own; the drift is ``|log(scale of the last half ÷ scale of the first half)|``.

    Args:
        predicted: ``[S, 3, 4]`` world-to-camera extrinsics.
        target: ``[S, 3, 4]``.

    Returns:
        The drift (0.1 is about ten percent); None where it is undefined: fewer than three frames,
        or a half in which either trajectory does not move or the two motions are uncorrelated.

    Raises:
        ValueError: Shapes are wrong or differ, or a value is NaN or infinite.
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
    """ATE, RPE, absolute rotation and scale drift of one clip.

    Args:
        predicted: ``[S, 3, 4]`` world-to-camera extrinsics.
        target: ``[S, 3, 4]``.

    Returns:
        The metrics; RPE is 0 for one frame, which `TrajectoryMetrics.degenerate` says.

    Raises:
        ValueError: Shapes are wrong or differ, or a value is NaN or infinite.
    """
    alignment = align_trajectories(predicted, target)
    drift = scale_drift(predicted, target)
    target = target.double()
    aligned = alignment.similarity.apply_to_extrinsics(predicted)
    centres, target_centres = camera_centres(aligned), camera_centres(target)

    def steps(extrinsics: Tensor) -> Tensor:
        """Pose of each camera in the frame of the one before, ``[S - 1, 3, 4]``."""
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
