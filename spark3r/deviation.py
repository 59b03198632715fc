"""How far a reduced run is from the dense one, in the few figures that a user reads first.

`calibrate.quality` has them all, and judges against ground truth and by consistency as well.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .errors import Spark3rError
from .metrics import (
    depth_metrics,
    point_deviation,
    pose_metrics,
    scale_drift,
    umeyama,
)
from .metrics.points import sample_evenly
from .prediction import Prediction

_POINTS = 20_000  # pixels that the figure of points is taken from, spread evenly over the clip


@dataclass(frozen=True)
class Deviation:
    """Distance of a run from the dense run.

    Attributes:
        depth: Mean |log ratio| of depth after one median scale per clip: .01 is about one percent.
        rotation_deg: Median relative rotation over all pairs of frames, degrees.
        translation_deg: Median direction of relative translation over the same, degrees.
        points: Mean distance of corresponding points over the scene's size after Sim(3) alignment.
        scale_drift: |log| of how much the scale changes along the clip; None where undefined.
    """

    depth: float
    rotation_deg: float
    translation_deg: float
    points: float
    scale_drift: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Return the figures by name."""
        return asdict(self)


def deviation(reduced: Prediction, dense: Prediction) -> Deviation:
    """Return how far a reduced run is from the dense run of the same clip.

    Raises:
        Spark3rError: A figure is undefined, such as with depth that is not positive.
    """
    try:
        source = sample_evenly(reduced.points.reshape(-1, 3), _POINTS)
        target = sample_evenly(dense.points.reshape(-1, 3), _POINTS)
        pose = pose_metrics(reduced.extrinsics, dense.extrinsics)
        return Deviation(
            depth=depth_metrics(reduced.depth, dense.depth, align="clip").log_ratio,
            rotation_deg=pose.rotation_deg,
            translation_deg=pose.translation_deg,
            points=point_deviation(source, target, umeyama(source, target)),
            scale_drift=scale_drift(reduced.extrinsics, dense.extrinsics),
        )
    except ValueError as error:
        raise Spark3rError(f"the runs cannot be compared: {error}") from error
