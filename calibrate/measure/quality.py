"""Quality of a run on one clip: error, consistency and deviation, all metrics of each.

- *error*: distances to ground truth, if the clip has it.
- *deviation*: the same distances to the dense run.
- *consistency*: disagreement of the run with itself, and the spreads that vanish in a collapse.

`calibrate.measure.score` turns each into one number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from spark3r.clips import Clip
from spark3r.errors import ClipError
from spark3r.geometry import unproject
from spark3r.metrics import (
    ConsistencyMetrics,
    align_trajectories,
    consistency_metrics,
    depth_metrics,
    point_deviation,
    point_metrics,
    pose_metrics,
    trajectory_metrics,
    umeyama,
)
from spark3r.metrics.points import sample_evenly
from spark3r.prediction import Prediction, PredictionError

PAN = 0.05
"""Extent of the cameras relative to the median depth, below which footage counts as a pan. Sim(3)
alignment of the trajectories then follows their noise."""

_POINTS = 20_000  # pixels for figures of points, spread evenly over the clip


@dataclass(frozen=True)
class Distances:
    """Distances of a run from a target: ground truth, or the dense run.

    Angles are in degrees, everything else is a fraction. Poses are compared over all pairs of
    frames, without any alignment. Figures whose names begin with ``trajectory`` follow a Sim(3)
    alignment of the trajectories.

    Attributes:
        depth: AbsRel of depth after one median scale per clip.
        depth_log: Mean |log ratio| of depth after the same scaling.
        depth_frame: AbsRel after one median scale per frame.
        depth_raw: AbsRel as predicted.
        delta_125: Share of pixels within a factor of 1.25 after one scale per clip.
        rotation_deg: Median relative rotation.
        translation_deg: Median direction of relative translation, 0 to 180.
        auc_3: AUC of pose up to 3 degrees.
        auc_30: AUC of pose up to 30 degrees.
        points: Mean distance of corresponding points ÷ the scene's size, after Sim(3) alignment of
            the points. (A trajectory that is short or far off would turn the whole scene.)
        accuracy: Mean distance of predicted points to the nearest target point ÷ the scene's size;
            None unless requested.
        completeness: Mean distance of target points to the nearest predicted point ÷ the scene's
            size; None unless requested.
        trajectory: Root mean square distance of the camera centres after Sim(3) alignment ÷ the
            extent of the target's centres; None on a pan.
        trajectory_rotation_deg: Mean angle of the orientations after the alignment; None on a pan.
        trajectory_step: Root mean square translation error from frame to frame (RPE) after the
            alignment ÷ the extent of the target's centres; None on a pan.
        trajectory_step_deg: Root mean square rotation error from frame to frame (RPE).
        trajectory_points: Like ``points``, after Sim(3) alignment of the trajectories; None on a
            pan.
        scale_drift: |log| of the change of scale along the clip; None where it is undefined.
        is_pan: True if the target's cameras hardly move.
    """

    depth: float
    depth_log: float
    depth_frame: float
    depth_raw: float
    delta_125: float
    rotation_deg: float
    translation_deg: float
    auc_3: float
    auc_30: float
    points: float
    accuracy: float | None
    completeness: float | None
    trajectory: float | None
    trajectory_rotation_deg: float | None
    trajectory_step: float | None
    trajectory_step_deg: float
    trajectory_points: float | None
    scale_drift: float | None
    is_pan: bool

    def figures(self) -> dict[str, float]:
        """Return all figures that are not None, by name."""
        return _known(asdict(self))


@dataclass(frozen=True)
class Quality:
    """Quality of one run on one clip.

    Attributes:
        clip: Name of the clip.
        error: Distances to ground truth; None if the clip has none.
        consistency: Disagreement of the run with itself.
        deviation: Distances to the dense run.
    """

    clip: str
    error: Distances | None
    consistency: ConsistencyMetrics
    deviation: Distances

    def figures(self) -> dict[str, float]:
        """Return all figures by source and name, such as ``deviation.rotation_deg``."""
        sources = {
            "error": {} if self.error is None else self.error.figures(),
            "consistency": _known(asdict(self.consistency)),
            "deviation": self.deviation.figures(),
        }
        return {
            f"{source}.{name}": value
            for source, figures in sources.items()
            for name, value in figures.items()
        }


def assess(
    prediction: Prediction, clip: Clip, dense: Prediction, *, clouds: bool = False
) -> Quality:
    """Return the quality of a run on a clip.

    Args:
        prediction: Prediction of the reduced model.
        clip: The clip, with or without ground truth.
        dense: Prediction of the dense model.
        clouds: Whether to compute accuracy and completeness, by far the slowest figures.

    Raises:
        ClipError: If the prediction's frames are not the clip's.
        PredictionError: If a depth is not positive.
    """
    expected = (clip.frames, *clip.images.shape[-2:])
    if prediction.depth.shape != expected or dense.depth.shape != expected:
        raise ClipError(
            f"clip '{clip.name}' has {list(expected)} frames and pixels, but the predictions "
            f"{list(prediction.depth.shape)} and {list(dense.depth.shape)}: resize the clip to "
            "what the model takes"
        )
    behind = int((prediction.depth <= 0).sum())
    if behind:
        raise PredictionError(
            f"clip '{clip.name}': {behind} of {prediction.depth.numel()} depths are not "
            "positive, so that frames cannot be compared with each other"
        )
    error = None
    if clip.depth is not None and clip.intrinsics is not None and clip.extrinsics is not None:
        points = unproject(clip.depth, clip.intrinsics, clip.extrinsics)
        error = distances(prediction, clip.depth, clip.extrinsics, points, clouds=clouds)
    return Quality(
        clip.name,
        error,
        consistency_metrics(prediction.depth, prediction.intrinsics, prediction.extrinsics),
        distances(prediction, dense.depth, dense.extrinsics, dense.points, clouds=clouds),
    )


def distances(
    prediction: Prediction,
    depth: Tensor,
    extrinsics: Tensor,
    points: Tensor,
    *,
    clouds: bool = False,
) -> Distances:
    """Return the distances of a prediction from a target.

    Args:
        prediction: The prediction.
        depth: Depth of the target, ``[S, H, W]``. Only positive and finite pixels count.
        extrinsics: Cameras of the target, ``[S, 3, 4]``.
        points: World points of the target, ``[S, H, W, 3]``.
        clouds: Whether to compute accuracy and completeness.
    """
    valid = torch.isfinite(depth) & (depth > 0)
    by_clip = depth_metrics(prediction.depth, depth, align="clip")
    pose = pose_metrics(prediction.extrinsics, extrinsics)
    trajectory = trajectory_metrics(prediction.extrinsics, extrinsics)
    is_pan = trajectory.extent < PAN * float(depth[valid].median())
    # Both clouds have the same number of points, so the same pixels are sampled.
    chosen = sample_evenly(valid.flatten().nonzero().flatten(), _POINTS)
    source = prediction.points.reshape(-1, 3)[chosen]
    target = points.reshape(-1, 3)[chosen]
    alignment = umeyama(source, target)
    by_trajectory = align_trajectories(prediction.extrinsics, extrinsics).similarity
    cloud = None
    if clouds:
        cloud = point_metrics(
            prediction.points, points, alignment, valid_predicted=valid, valid_target=valid
        )
    return Distances(
        depth=by_clip.abs_rel,
        depth_log=by_clip.log_ratio,
        depth_frame=depth_metrics(prediction.depth, depth, align="frame").abs_rel,
        depth_raw=depth_metrics(prediction.depth, depth).abs_rel,
        delta_125=by_clip.delta_125,
        rotation_deg=pose.rotation_deg,
        translation_deg=pose.translation_deg,
        auc_3=pose.auc_3,
        auc_30=pose.auc_30,
        points=point_deviation(source, target, alignment),
        accuracy=None if cloud is None else cloud.accuracy_mean,
        completeness=None if cloud is None else cloud.completeness_mean,
        trajectory=None if is_pan else trajectory.ate / trajectory.extent,
        trajectory_rotation_deg=None if is_pan else trajectory.rotation_deg,
        trajectory_step=None if is_pan else trajectory.rpe_translation / trajectory.extent,
        trajectory_step_deg=trajectory.rpe_rotation_deg,
        trajectory_points=None if is_pan else point_deviation(source, target, by_trajectory),
        scale_drift=trajectory.scale_drift,
        is_pan=is_pan,
    )


def mean_figures(qualities: Sequence[Quality]) -> dict[str, float]:
    """Return the mean over clips of every figure that all of them have.

    Raises:
        ValueError: If there is no clip.
    """
    if not qualities:
        raise ValueError("there is no clip to take means over")
    tables = [quality.figures() for quality in qualities]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    return {name: sum(table[name] for table in tables) / len(tables) for name in names}


def _known(fields: Mapping[str, object]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in fields.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
