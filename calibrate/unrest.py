"""How uneven timings are, and what they are then worth beside a prediction."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from spark3r.timing import Latency

PREDICTION_ERROR = 0.03
"""Error of a prediction, as a share, that single timings are weighed against."""


def unrest_of(latencies: Mapping[str, Latency]) -> float:
    """Return how much timings of the same call differ, as a share: the median over calls."""
    shares = [each.spread_ms / each.median_ms for each in latencies.values() if each.n > 1]
    return statistics.median(shares) if shares else 0.0


def believed_ms(predicted_ms: float, measured_ms: float, unrest: float) -> float:
    """Return the latency to believe in, between what was predicted and what was measured.

    Their geometric mean, each weighing as the inverse of its squared error: timings of a quiet
    machine stand, those of a busy one hardly move a prediction that was fitted to many more.

    Args:
        predicted_ms: What the latency model says.
        measured_ms: Median of a few timings.
        unrest: How much timings of the same call differ just then, as a share.
    """
    weight = PREDICTION_ERROR**2 / (PREDICTION_ERROR**2 + unrest**2)
    return predicted_ms * float((measured_ms / predicted_ms) ** weight)
