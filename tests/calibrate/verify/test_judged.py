"""How many timings a schedule is judged by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from calibrate.search.problem import DeviationLimit, Goal, LatencyLimit
from calibrate.verify.correction import TargetTimes
from spark3r import Schedule
from spark3r.timing import Latency

SCHEDULE = Schedule.dense(2)
NOTHING: Any = None  # neither a job nor latencies are needed where nothing is timed


@dataclass(frozen=True)
class Times(TargetTimes):
    """Samples that were made up, instead of timings."""

    made_up: tuple[float, ...] = ()
    asked: list[int] = field(default_factory=list)

    def of(self, schedule: Schedule, step: str, least: int = 2) -> Latency | None:
        self.asked.append(least)
        return Latency(self.made_up[:least]) if self.made_up else None


@pytest.mark.parametrize(
    ("goal", "made_up", "samples"),
    [
        (LatencyLimit(15_000.0), (14_900.0, 16_000.0), 1),  # long, and within the budget
        (LatencyLimit(15_000.0), (15_200.0, 16_000.0), 1),  # as much above it as counts as met
        (LatencyLimit(15_000.0), (15_400.0, 14_000.0), 2),  # more: a second one decides
        (LatencyLimit(15_000.0), (9_000.0, 9_000.0), 2),  # short
        (LatencyLimit(9_000.0), (8_000.0, 8_000.0), 2),
        (DeviationLimit(0.01), (14_900.0, 15_000.0), 2),
        (LatencyLimit(15_000.0), (), 0),  # it does not fit into memory
    ],
)
def test_one_long_timing_within_the_budget_is_enough(
    goal: Goal, made_up: tuple[float, ...], samples: int
) -> None:
    times = Times(NOTHING, NOTHING, made_up=made_up)
    latency = times.judged(SCHEDULE, "latency of the answer", goal)
    assert (0 if latency is None else latency.n) == samples
    assert times.asked[-1] == max(1, samples)
