"""Verification of the exported schedule and its rivals, at the target length and on held-out clips.

Latencies are taken in turns with dense and the wall, so that all are from the same minutes. Quality
is measured on clips that neither the search nor the selection saw. Only these figures are reported
as the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from spark3r.schedule import Schedule
from spark3r.timing import Latency

from ..measure.evaluator import DenseRuns, Evaluator, is_failure
from ..measure.quality import Quality
from ..measure.timing import LatencyTable, Pass, slowdown_from_model, time_passes
from ..progress import Progress, no_progress
from ..settings import Job
from .selection import Decision


@dataclass(frozen=True)
class Verified:
    """Measurements of dense, of the wall, or of a schedule.

    Attributes:
        name: ``dense``, ``wall`` or a finalist's kind.
        latency: Latency per clip of the target length; None if the pass does not fit.
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
    """The measurements at the end of a calibration, all from the same minutes.

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

    def slowdown(self, table: LatencyTable) -> float:
        """Return measured ÷ predicted latency, the slowdown of the machine since the model."""
        timed = [
            (each.latency.median_ms, each.predicted_ms)
            for each in self.schedules
            if each.latency is not None
        ]
        wall = self.wall.latency
        wall_ms = table.wall_ms if wall is None else wall.median_ms
        return slowdown_from_model(timed, (wall_ms, table.model.wall_ms(table.layout)))


def time_beside_the_wall(
    job: Job,
    schedules: Mapping[str, Schedule],
    images: Tensor,
    step: str,
    *,
    dense: bool = True,
    share: float = 1.0,
) -> dict[str, Latency]:
    """Time schedules in turns with the wall and with dense.

    Args:
        job: The job.
        schedules: Schedules to time, by name.
        images: A clip of the target length, ``[S, 3, H, W]``.
        step: Name of the step, for its progress.
        dense: Whether to time dense, default yes.
        share: Seconds to take as a share of `Settings.timing_s`, default 1.

    Returns:
        The latencies by name, with ``wall`` and ``dense``, without passes that do not fit.
    """
    passes: dict[str, Pass] = {"wall": "wall", **schedules}
    if dense:
        passes["dense"] = "dense"
    return time_passes(
        job.runner,
        images,
        passes,
        timer=job.timer,
        limit_s=share * job.settings.timing_s,
        progress=job.reporter.step(step),
    )


def verify(
    evaluator: Evaluator,
    decision: Decision,
    held_out: DenseRuns,
    latencies: Mapping[str, Latency],
    progress: Progress = no_progress,
) -> Verification:
    """Measure the quality of every finalist on the held-out clips.

    A rival that fails there is left out. If the chosen schedule fails, that is an error. The
    latencies of dense, the wall and the finalists (by kind) are given.

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
                latencies.get(each.kind),
                qualities,
                evaluator.scores(qualities, held_out),
                schedule=each.trial.schedule,
                predicted_ms=each.trial.latency_ms,
            )
        )
    progress(len(decision.finalists), len(decision.finalists))
    dense_scores = evaluator.scores(held_out.qualities, held_out)
    return Verification(
        Verified("dense", latencies.get("dense"), held_out.qualities, dense_scores),
        Verified("wall", latencies.get("wall")),
        tuple(schedules),
    )
