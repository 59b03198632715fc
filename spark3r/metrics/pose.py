"""Relative pose errors over all pairs of frames, and the AUC of VGGT's evaluation.

A pair (i, j), i < j, has the relative pose ``T_i T_j⁻¹`` (camera j to camera i). A global rigid
motion of either trajectory does not matter, and for the direction of translation neither does a
global scale.

There are two translation figures, for two uses:

- ``translation_deg``: the angle between the two translation vectors, 0 to 180. A random direction
  scores 90. This is what tables of errors and deviations report.
- ``translation_axis_deg``: ``min(e, 180 - e)``, 0 to 90, blind to the sign. VGGT's evaluation
  (``evaluation/test_co3d.py``) uses it, so the AUC here does, and only the AUC.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import camera_centres, check_finite, check_shape

# Baselines below this, in world units and relative to the cameras' distance from the origin, are
# rounding noise of float32 poses: no direction can be read from them.
NO_BASELINE = 1e-6


@dataclass(frozen=True)
class PairErrors:
    """Relative pose errors of all pairs, in the order of `frame_pairs`.

    Attributes:
        rotation_deg: Angle of the relative rotation, ``[..., P]`` float64, 0 to 180.
        translation_deg: Angle between the translation vectors, ``[..., P]`` float64, 0 to 180. It
            is 90 for a pair without a baseline in the prediction or in the target.
        has_baseline: Whether a pair's cameras in the target have a baseline, ``[..., P]`` bool.
            Without one there is no direction to compare with, and averages should leave the pair
            out.
    """

    rotation_deg: Tensor
    translation_deg: Tensor
    has_baseline: Tensor

    @property
    def translation_axis_deg(self) -> Tensor:
        """Translation error up to sign, ``[..., P]``, 0 to 90; pairs without baseline have 90."""
        return torch.minimum(self.translation_deg, 180 - self.translation_deg)


@dataclass(frozen=True)
class PoseMetrics:
    """Relative pose metrics of one clip over all pairs of frames.

    Attributes:
        rotation_deg: Median relative rotation error, degrees.
        rotation_mean_deg: Mean relative rotation error, degrees.
        translation_deg: Median error of the translation direction, degrees, 0 to 180 (chance 90),
            over pairs where the target has a baseline.
        translation_mean_deg: Mean error of the translation direction, degrees, over the same pairs.
        auc_3: AUC of max(rotation, translation axis) up to 3 degrees as VGGT defines it, 0 to 1.
        auc_5: The same AUC up to 5 degrees.
        auc_15: The same AUC up to 15 degrees.
        auc_30: The same AUC up to 30 degrees.
        pairs: Number of pairs.
        pairs_with_baseline: Number of pairs where the target's cameras do not coincide.
        degenerate: Reason why some figures are conventions and not measurements, or None. With one
            frame, errors are 0 and AUCs 1. Without a baseline in the target, translation errors are
            0 and the AUCs count rotation alone.
    """

    rotation_deg: float
    rotation_mean_deg: float
    translation_deg: float
    translation_mean_deg: float
    auc_3: float
    auc_5: float
    auc_15: float
    auc_30: float
    pairs: int
    pairs_with_baseline: int
    degenerate: str | None = None


def rotation_angle_deg(first: Tensor, second: Tensor) -> Tensor:
    """Return the angle between rotations, accurate near 0 and near 180 degrees.

    Args:
        first: Rotation matrices ``[..., 3, 3]``.
        second: Rotation matrices ``[..., 3, 3]``, broadcast against the first.

    Returns:
        ``[...]`` degrees, float64.

    Raises:
        ValueError: If a shape is wrong.
    """
    check_shape("first", first, (3, 3))
    check_shape("second", second, (3, 3))
    first, second = first.double(), second.double()
    return _angle_deg((first - second).flatten(-2), (first * second).sum(dim=(-1, -2)))


def _angle_deg(difference: Tensor, trace: Tensor) -> Tensor:
    """Return the angle of R from the difference of its factors ``[..., 9]`` and tr R ``[...]``."""
    # ‖A - B‖_F = 2√2 sin(θ/2) and tr(AᵀB) = 1 + 2 cos θ = 4 cos²(θ/2) - 1: the arc cosine of the
    # trace alone loses half the digits at 0 and at 180 degrees.
    sine = difference.norm(dim=-1) / math.sqrt(8)
    cosine = ((trace + 1) / 4).clamp(min=0).sqrt()
    return torch.rad2deg(2 * torch.atan2(sine, cosine))


def direction_angle_deg(first: Tensor, second: Tensor) -> Tensor:
    """Return the angle between vectors, accurate near 0 and near 180; 90 if either is zero.

    Args:
        first: Vectors ``[..., 3]``.
        second: Vectors ``[..., 3]``.

    Returns:
        ``[...]`` degrees, float64.
    """
    first, second = first.double(), second.double()
    # Kahan's formula: 2 atan2(‖a‖b‖ - b‖a‖‖, ‖a‖b‖ + b‖a‖‖).
    a = first * second.norm(dim=-1, keepdim=True)
    b = second * first.norm(dim=-1, keepdim=True)
    angle = torch.rad2deg(2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)))
    zero = (first == 0).all(dim=-1) | (second == 0).all(dim=-1)
    return torch.where(zero, torch.full_like(angle, 90.0), angle)


def frame_pairs(frames: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return all pairs i < j of frames, in lexicographic order.

    Args:
        frames: Number of frames S.
        device: Device of the indices.

    Returns:
        Two ``[S (S - 1) / 2]`` int64 tensors.
    """
    first, second = torch.triu_indices(frames, frames, offset=1, device=device).unbind(0)
    return first, second


def _baselines(extrinsics: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return relative translations ``[..., P, 3]``, and whether they exceed rounding noise."""
    centres = camera_centres(extrinsics)
    # The translation of T_i T_j⁻¹ is R_i (c_j - c_i).
    step = centres[..., second, :] - centres[..., first, :]
    relative = (extrinsics[..., first, :, :3] @ step[..., None]).squeeze(-1)
    reach = centres.norm(dim=-1).amax(dim=-1, keepdim=True).clamp(min=1.0)
    return relative, step.norm(dim=-1) > NO_BASELINE * reach


def relative_pose_errors(predicted: Tensor, target: Tensor) -> PairErrors:
    """Return relative rotation and translation-direction errors of all pairs of frames.

    Args:
        predicted: World-to-camera extrinsics ``[..., S, 3, 4]``.
        target: World-to-camera extrinsics ``[..., S, 3, 4]``.

    Returns:
        Errors of the S (S - 1) / 2 pairs. One frame has none.

    Raises:
        ValueError: If shapes differ, or a value is NaN or infinite.
    """
    check_shape("predicted", predicted, (None, 3, 4))
    if predicted.shape != target.shape:
        raise ValueError(
            f"target: expected shape {list(predicted.shape)}, found {list(target.shape)}"
        )
    check_finite("predicted", predicted)
    check_finite("target", target)
    predicted, target = predicted.double(), target.double()
    first, second = frame_pairs(predicted.shape[-3], predicted.device)

    # The error rotation of a pair is conjugate to D_i D_jᵀ with D = R_targetᵀ R_predicted, so one
    # 3×3 matrix per frame serves all pairs.
    offset = target[..., :3].transpose(-1, -2) @ predicted[..., :3]
    offset = offset.flatten(-2)
    a, b = offset[..., first, :], offset[..., second, :]
    rotation_deg = _angle_deg(a - b, (a * b).sum(dim=-1))

    move_predicted, moves = _baselines(predicted, first, second)
    move_target, has_baseline = _baselines(target, first, second)
    translation_deg = direction_angle_deg(move_predicted, move_target)
    translation_deg = torch.where(
        moves & has_baseline, translation_deg, torch.full_like(translation_deg, 90.0)
    )
    return PairErrors(rotation_deg, translation_deg, has_baseline)


def pose_auc(rotation_deg: Tensor, translation_deg: Tensor, threshold: int) -> Tensor:
    """Return the area under the recall curve of max(rotation, translation), as VGGT evaluates it.

    It is `calculate_auc_np` of VGGT's ``evaluation/test_co3d.py``: a histogram of the larger of the
    two errors in bins of one degree up to the threshold (the last bin includes its right edge),
    divided by the number of pairs, summed cumulatively, averaged over the bins. So a pair with
    error e adds ``(threshold - ⌊e⌋) / threshold``, and an error exactly at the threshold adds
    ``1 / threshold``.

    Args:
        rotation_deg: Rotation errors ``[..., P]`` in degrees.
        translation_deg: Translation errors ``[..., P]`` in degrees. VGGT takes the error up to
            sign, `PairErrors.translation_axis_deg`.
        threshold: Whole number of degrees, at least 1.

    Returns:
        ``[...]`` float64 in [0, 1].

    Raises:
        ValueError: If there are no pairs, or the threshold is below 1.
    """
    if threshold < 1:
        raise ValueError(f"threshold: expected at least 1 degree, found {threshold}")
    worst = torch.maximum(rotation_deg.double(), translation_deg.double())
    if worst.shape[-1] == 0:
        raise ValueError("pose_auc: no pairs of frames")
    bins = worst.floor().clamp(max=threshold - 1)
    gain = torch.where(worst <= threshold, threshold - bins, torch.zeros_like(bins))
    return gain.mean(dim=-1) / threshold


def pose_metrics(predicted: Tensor, target: Tensor) -> PoseMetrics:
    """Return relative pose metrics of one clip.

    Args:
        predicted: World-to-camera extrinsics ``[S, 3, 4]``.
        target: World-to-camera extrinsics ``[S, 3, 4]``.

    Returns:
        Medians and means over all pairs, and AUCs. `PoseMetrics.degenerate` defines them for one
        frame and for a target that does not move.

    Raises:
        ValueError: If shapes are wrong or differ, or a value is NaN or infinite.
    """
    if predicted.dim() != 3:
        raise ValueError(f"predicted: expected [S, 3, 4], found {list(predicted.shape)}")
    errors = relative_pose_errors(predicted, target)
    pairs = errors.rotation_deg.numel()
    if pairs == 0:
        return PoseMetrics(
            0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0, 0, degenerate="one frame: there are no pairs"
        )
    translation = errors.translation_deg[errors.has_baseline]
    moving = translation.numel()
    degenerate = None
    axis = errors.translation_axis_deg
    if moving == 0:
        degenerate = "the target's cameras do not move: translation has no direction"
        translation = axis.new_zeros(1)
        axis = torch.zeros_like(axis)
    auc = [float(pose_auc(errors.rotation_deg, axis, t)) for t in (3, 5, 15, 30)]
    return PoseMetrics(
        rotation_deg=_median(errors.rotation_deg),
        rotation_mean_deg=float(errors.rotation_deg.mean()),
        translation_deg=_median(translation),
        translation_mean_deg=float(translation.mean()),
        auc_3=auc[0],
        auc_5=auc[1],
        auc_15=auc[2],
        auc_30=auc[3],
        pairs=pairs,
        pairs_with_baseline=moving,
        degenerate=degenerate,
    )


def _median(values: Tensor) -> float:
    """Return the median; of an even number of values, the mean of the two middle ones."""
    ordered = values.sort().values
    count = ordered.numel()
    return float((ordered[(count - 1) // 2] + ordered[count // 2]) / 2)
