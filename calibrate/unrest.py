"""How uneven timings are, and what they are then worth beside a prediction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from spark3r.timing import Latency

PREDICTION_ERROR = 0.03
"""Error of a prediction, as a share, that single timings are weighed against."""


def unrest_of(*timings: Mapping[str, Latency]) -> float:
    """Return how much timings of the same call differ, as a share.

    The median over calls, and of timings from several times that of the busiest.
    """
    return max(map(_median_share, timings), default=0.0)


def drift_of(then_ms: Mapping[str, float], now: Mapping[str, Latency]) -> tuple[float, float]:
    """Return how much slower a machine has become, and how unsure that is.

    Args:
        then_ms: What calls took, by name.
        now: What they take, by name; one of them at least has to be among them.

    Returns:
        What they take together divided by what they took; and by how much that ratio differs
        between them, as a share.
    """
    known = [(now[name].median_ms, took_ms) for name, took_ms in then_ms.items() if name in now]
    slower = [takes_ms / took_ms for takes_ms, took_ms in known]
    together = sum(takes_ms for takes_ms, _ in known) / sum(took_ms for _, took_ms in known)
    return together, math.log(max(slower) / min(slower))


def pace_of(timed: Sequence[tuple[float, float]], wall: tuple[float, float]) -> float:
    """Return how much slower a machine is than a latency model has it.

    Args:
        timed: Measured and predicted latencies of schedules.
        wall: The same of the wall, which is short and easily disturbed: taken where there is no
            schedule.
    """
    return statistics.median(now_ms / predicted_ms for now_ms, predicted_ms in timed or (wall,))


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


def _median_share(latencies: Mapping[str, Latency]) -> float:
    shares = [each.spread_ms / each.median_ms for each in latencies.values() if each.n > 1]
    return statistics.median(shares) if shares else 0.0
