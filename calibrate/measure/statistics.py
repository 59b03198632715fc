"""Means over clips with confidence intervals, and paired comparison of two schedules."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy.stats import t as student_t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedRatio:
    """The ratio of a figure under two schedules, over the same clips.

    Attributes:
        ratio: Geometric mean over clips of candidate ÷ baseline.
        low: Lower end of the confidence interval.
        high: Upper end of the confidence interval.
        clips: Number of clips.
    """

    ratio: float
    low: float
    high: float
    clips: int

    @property
    def is_lower(self) -> bool:
        """Whether the candidate's figure is lower beyond the confidence interval."""
        return self.high < 1

    @property
    def is_higher(self) -> bool:
        """Whether the candidate's figure is higher beyond the confidence interval."""
        return self.low > 1

    def __str__(self) -> str:
        clips = f"{self.clips} clip{'s' * (self.clips > 1)}"
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f}, {clips})"


def paired_ratio(
    candidate: Mapping[str, float],
    baseline: Mapping[str, float],
    *,
    tolerance: float = 0.0,
    confidence: float = CONFIDENCE,
) -> PairedRatio:
    """Compare a figure by clip: geometric mean of the ratios, with a paired t interval of the logs.

    Args:
        candidate: Figure of each clip by the clip's name, not negative.
        baseline: Figure of each clip under the other schedule.
        tolerance: Number added to all figures, so that those near 0 do not decide; see `.score`.
        confidence: Confidence level of the interval, default 0.95.

    Returns:
        The comparison. The interval of a single clip is from 0 to infinity.

    Raises:
        ValueError: If the clips differ, there is none, or a figure plus tolerance is not positive.
    """
    if not candidate or candidate.keys() != baseline.keys():
        unpaired = sorted(candidate.keys() ^ baseline.keys())
        raise ValueError(f"expected figures of the same clips, unpaired: {unpaired or 'all'}")
    logs = []
    for clip, value in candidate.items():
        above, below = value + tolerance, baseline[clip] + tolerance
        if not (0 < above < math.inf and 0 < below < math.inf):
            raise ValueError(
                f"clip '{clip}': figures {value} and {baseline[clip]} have no ratio, expected "
                "positive numbers (or a tolerance)"
            )
        logs.append(math.log(above / below))
    mean = math.fsum(logs) / len(logs)
    if len(logs) == 1:
        return PairedRatio(math.exp(mean), 0.0, math.inf, 1)
    half = _half_width(logs, confidence)
    return PairedRatio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs))


class Mean(NamedTuple):
    """A mean over clips.

    Attributes:
        mean: The mean.
        low: Lower end of the confidence interval; the mean itself for a single clip.
        high: Upper end of the confidence interval.
    """

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Mean:
    """Return the mean of a figure over clips with its t interval.

    Raises:
        ValueError: If there is no value.
    """
    if not values:
        raise ValueError("there is no clip to take the mean over")
    mean = math.fsum(values) / len(values)
    half = _half_width(values, confidence) if len(values) > 1 else 0.0
    return Mean(mean, mean - half, mean + half)


def _half_width(values: Sequence[float], confidence: float) -> float:
    quantile = float(student_t.ppf((1 + confidence) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
