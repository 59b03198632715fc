"""Verification of the exported schedule and its rivals on held-out clips.

Quality is measured on clips that neither the search nor the selection saw. Only these figures are
reported as the result, with the latency of the exported schedule at the target length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from spark3r.schedule import Schedule
from spark3r.timing import Latency

from ..measure.evaluator import DenseRuns, Evaluator, is_failure
from ..measure.measurements import LatencyTable
from ..measure.quality import Quality
from ..progress import Progress, no_progress
from .selection import Decision


@dataclass(frozen=True)
class Verified:
    """Measurements of dense, of the wall, or of a schedule.

    Attributes:
        name: ``dense``, ``wall`` or a finalist's kind.
        latency: Latency per clip of the target length; None if the pass was not timed.
        qualities: Quality on each held-out clip; empty for the wall.
        scores: Score on each held-out clip, by the clip's name; empty for the wall.
    """

    name: str
    latency: Latency | None
    qualities: tuple[Quality, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """Mean score on the held-out clips, None if quality was not measured."""
        return math.fsum(self.scores.values()) / len(self.scores) if self.scores else None


@dataclass(frozen=True)
class VerifiedSchedule(Verified):
    """Measurements of a schedule.

    Attributes:
        schedule: The schedule.
        predicted_ms: Predicted latency per clip.
    """

    schedule: Schedule = field(kw_only=True)
    predicted_ms: float = field(kw_only=True)


@dataclass(frozen=True)
class Verification:
    """The measurements at the end of a calibration.

    Attributes:
        dense: The dense model.
        wall: The wall, without quality.
        schedules: The finalists, the simplest kind first.
    """

    dense: Verified
    wall: Verified
    schedules: tuple[VerifiedSchedule, ...] = ()

    @property
    def treatments(self) -> tuple[Verified, ...]:
        """Dense, the wall and the finalists."""
        return (self.dense, self.wall, *self.schedules)


def verify(
    evaluator: Evaluator,
    decision: Decision,
    held_out: DenseRuns,
    table: LatencyTable,
    timed: Mapping[Schedule, Latency],
    progress: Progress = no_progress,
) -> Verification:
    """Measure the quality of every finalist on the held-out clips.

    A rival that fails there is left out. If the chosen schedule fails, that is an error.

    Args:
        evaluator: Runs and scores.
        decision: The finalists.
        held_out: Dense runs of the held-out clips.
        table: Latencies of dense and the wall at the target length.
        timed: Latencies of schedules there. Rivals that were not timed have none.
        progress: Callback(schedules run, their total).

    Raises:
        PredictionError: If the chosen schedule returns NaN there.
    """
    schedules = []
    for number, each in enumerate(decision.finalists):
        progress(number, len(decision.finalists))
        try:
            qualities = evaluator.qualities(each.trial.schedule, held_out)
        except Exception as error:
            if each is decision.chosen or not is_failure(error):
                raise
            continue
        schedules.append(
            VerifiedSchedule(
                each.kind,
                timed.get(each.trial.schedule),
                qualities,
                evaluator.scores(qualities, held_out),
                schedule=each.trial.schedule,
                predicted_ms=each.trial.latency_ms,
            )
        )
    progress(len(decision.finalists), len(decision.finalists))
    dense_scores = evaluator.scores(held_out.qualities, held_out)
    return Verification(
        Verified("dense", table.dense, held_out.qualities, dense_scores),
        Verified("wall", table.wall),
        tuple(schedules),
    )
