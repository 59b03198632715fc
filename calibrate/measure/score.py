"""One number per clip and source, for a search to minimise.

*Error* and *consistency* are compared with the dense run on the same clip: the score is the
weighted mean over metrics of ``log((x + tolerance) / (x of dense + tolerance))``, so 0 is dense,
0.05 about five percent worse, and below 0 better than dense. The tolerance is the size of
difference that does not matter; it keeps clips on which dense is all but perfect from drowning the
others, and bounds the logarithm.

*Deviation* of the dense run is 0, so there the score is ``0.01 × Σ weight × x / tolerance``: 0.01,
that is 1 %, where every metric is at its tolerance. ``--max-deviation 1%`` means that.

===============  ==========  ============  ======================================================
metric           of error    of deviation
===============  ==========  ============  ======================================================
depth            0.002       0.01          AbsRel, mean |log ratio|: one scale per clip
rotation         0.1°        1°            median over pairs of frames, no alignment
translation      0.5°        4°            its direction, likewise
points           0.002       0.01          share of the scene's size
===============  ==========  ============  ======================================================

The tolerance of consistency is 0.001. The steps of deviation are about as large as each other: in
the pilot a depth deviation of 0.01 came with 0.8° of rotation, and four times as many degrees of
translation direction.

Error of a few clips is noisy, deviation is not, and ranks schedules like the error of other clips
(docs/method/quality.md). So a search for error minimises their sum, deviation weighed by
`DEVIATION_WEIGHT`: about as much as error grows with it, so that each counts half. What is exported
is decided by error itself.

Cameras that stop moving and depth that flattens are consistent with themselves. A run whose spread
of cameras or of depth fell below half of dense's counts as collapsed, and its consistency scores
`COLLAPSED` on that clip: as if ten times as inconsistent as dense, yet finite, so that a mean over
clips and a model of the scores remain of use.
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
"""Deviation that does not matter, added before deviations are divided or their logarithms taken."""

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
    """Return how bad a run is on one clip; 0 is as dense, smaller is better.

    Args:
        quality: Of the reduced run.
        dense: Of the dense run on the same clip.
        source: What it is judged by.
        objective: Which metrics count, alike: ``balanced`` depth, rotation and translation
            direction, ``pose`` the latter two. Consistency is one figure for depth and poses
            together, whatever the objective.

    Raises:
        ClipError: If the source is ``error`` and the clip has no ground truth.
        ValueError: If the two are not of one clip.
    """
    if quality.clip != dense.clip:
        raise ValueError(f"a run on '{quality.clip}' is compared with one on '{dense.clip}'")
    if source == "deviation":
        return _deviation(quality.deviation, _METRICS[objective])
    if source == "consistency":
        return _consistency(quality.consistency, dense.consistency)
    if quality.error is None or dense.error is None:
        raise ClipError(
            f"clip '{quality.clip}' has no ground truth to take errors from: take rendered clips, "
            "or another --objective-from"
        )
    return _error(quality.error, dense.error, _METRICS[objective])


def mean_score(
    qualities: Sequence[Quality],
    dense: Sequence[Quality],
    source: Source,
    objective: Objective = "balanced",
) -> float:
    """Return the mean of the scores over clips, of which both lists hold the same in one order.

    Raises:
        ClipError: As `score`.
        ValueError: If the clips differ, or there is none.
    """
    scores = [
        score(quality, reference, source, objective)
        for quality, reference in zip(qualities, dense, strict=True)
    ]
    if not scores:
        raise ValueError("there is no clip to take the mean score over")
    return math.fsum(scores) / len(scores)


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
        return 0.0  # no two frames of this clip can be compared: nothing is known, nothing counted
    if metrics.log_ratio is None or collapsed(metrics, dense):
        return COLLAPSED
    ratio = (metrics.log_ratio + CONSISTENCY_TOLERANCE) / (dense.log_ratio + CONSISTENCY_TOLERANCE)
    return min(math.log(ratio), COLLAPSED)
