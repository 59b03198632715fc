"""One number per clip and source, for a search to minimise.

*Error* and *consistency* are compared with the dense run on the same clip. The score is the mean
over metrics of ``log((x + tolerance) / (x of dense + tolerance))``: 0 is as good as dense, 0.05
about five percent worse, and a negative score is better than dense. A difference of the size of the
tolerance does not matter. Without a tolerance, clips on which dense is almost perfect would
dominate, and the logarithm would be unbounded.

*Deviation* of the dense run is 0, so the score is ``0.01 × mean of x / tolerance``. It is 0.01, or
1 %, if every metric is at its tolerance. ``--max-deviation 1%`` means that.

===============  ==========  ============  ======================================================
metric           of error    of deviation
===============  ==========  ============  ======================================================
depth            0.002       0.01          AbsRel or mean |log ratio|, one scale per clip
rotation         0.1°        1°            median over pairs of frames, without alignment
translation      0.5°        4°            direction, median over pairs of frames
points           0.002       0.01          relative to the scene's size
===============  ==========  ============  ======================================================

The tolerance of consistency is 0.001. The tolerances of deviation match each other: in early
measurements a depth deviation of 0.01 came with 0.8° of rotation, and four times as many degrees of
translation direction.

Error on a few clips is noisy. Deviation is not, and ranks schedules like the error on other clips
(docs/method/quality.md). So a search for error minimises their sum. `DEVIATION_WEIGHT` is about the
growth of error with deviation, so that each counts half. The exported schedule is selected by error
itself.

Cameras that stop moving and depth that flattens are consistent with themselves. If the spread of
cameras or of depth falls below half of that of dense, the run counts as collapsed, and its
consistency score on that clip is `COLLAPSED`. That is ten times as inconsistent as dense, but
finite, so that a mean over clips and a model of the scores stay meaningful.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from spark3r.errors import ClipError
from spark3r.metrics import ConsistencyMetrics, collapsed

from ..defaults import Objective, Source
from .quality import Distances, Quality

ERROR_TOLERANCE: Mapping[str, float] = MappingProxyType(
    {"depth": 0.002, "rotation_deg": 0.1, "translation_deg": 0.5, "points": 0.002}
)
DEVIATION_TOLERANCE: Mapping[str, float] = MappingProxyType(
    {"depth_log": 0.01, "rotation_deg": 1.0, "translation_deg": 4.0, "points": 0.01}
)
CONSISTENCY_TOLERANCE = 0.001

LEAST_DEVIATION = 1e-4
"""Deviation that does not matter. It is added before deviations are divided or logarithms taken."""

DEVIATION_WEIGHT = 10.0
"""Weight of deviation in a search for error."""

COLLAPSED = math.log(10)
"""Consistency score of a run whose cameras stopped moving or whose depth flattened."""

_METRICS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "balanced": ("depth", "rotation_deg", "translation_deg"),
        "depth": ("depth",),
        "pose": ("rotation_deg", "translation_deg"),
        "points": ("points",),
    }
)


def score(
    quality: Quality, dense: Quality, source: Source, objective: Objective = "balanced"
) -> float:
    """Return the score of a run on one clip: 0 is as good as dense, smaller is better.

    Args:
        quality: Quality of the reduced run.
        dense: Quality of the dense run on the same clip.
        source: What the run is judged by.
        objective: Metrics that count, all with the same weight: ``balanced`` takes depth, rotation
            and translation direction, ``pose`` the latter two. Consistency is one figure for depth
            and poses together, whatever the objective.

    Raises:
        ClipError: If the source is ``error`` and the clip has no ground truth.
        ValueError: If the qualities are from different clips.
    """
    if quality.clip != dense.clip:
        raise ValueError(f"a run on '{quality.clip}' is compared with one on '{dense.clip}'")
    if source == "deviation":
        return _deviation(quality.deviation, _METRICS[objective])
    if source == "consistency":
        return _consistency(quality.consistency, dense.consistency)
    if quality.error is None or dense.error is None:
        raise ClipError(
            f"clip '{quality.clip}' has no ground truth to compute errors from: take rendered "
            "clips, or another --objective-from"
        )
    return _error(quality.error, dense.error, _METRICS[objective])


def _error(distances: Distances, dense: Distances, metrics: Sequence[str]) -> float:
    ratios = [
        math.log((getattr(distances, name) + tolerance) / (getattr(dense, name) + tolerance))
        for name in metrics
        for tolerance in [ERROR_TOLERANCE[name]]
    ]
    return math.fsum(ratios) / len(ratios)


def _deviation(distances: Distances, metrics: Sequence[str]) -> float:
    names = ["depth_log" if name == "depth" else name for name in metrics]
    shares = [getattr(distances, name) / DEVIATION_TOLERANCE[name] for name in names]
    return 0.01 * math.fsum(shares) / len(shares)


def _consistency(metrics: ConsistencyMetrics, dense: ConsistencyMetrics) -> float:
    if dense.log_ratio is None:
        return 0.0  # no two frames of this clip can be compared
    if metrics.log_ratio is None or collapsed(metrics, dense):
        return COLLAPSED
    ratio = (metrics.log_ratio + CONSISTENCY_TOLERANCE) / (dense.log_ratio + CONSISTENCY_TOLERANCE)
    return min(math.log(ratio), COLLAPSED)
