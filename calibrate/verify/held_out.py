"""Verification: what is exported and its rivals, measured at the target length and held out.

Latencies are taken in turns with dense and the wall, so that all are from the same minutes; quality
is measured on clips that neither the search nor the selection saw. Only these figures are reported
as the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from spark3r.schedule import Schedule
from spark3r.timing import Latency

from ..measure.evaluator import DenseRuns, Judge, is_failure
from ..measure.quality import Quality
from ..measure.timing import LatencyTable, Treatment, pace_of, time_passes
from ..progress import Samples, uncounted
from .selection import Decision


@dataclass(frozen=True)
class Verified:
    """What a treatment measured.

    Attributes:
        name: ``dense``, ``wall`` or a finalist's kind.
        schedule: The schedule, None for dense and the wall.
        predicted_ms: What the latency model says, None for dense and the wall.
        latency: Measured, per clip of the target length; None where dense does not fit.
        qualities: On the held-out clips; empty for the wall.
        scores: On the held-out clips, by name.
    """

    name: str
    schedule: Schedule | None
    predicted_ms: float | None
    latency: Latency | None
    qualities: tuple[Quality, ...]
    scores: Mapping[str, float]

    @property
    def score(self) -> float | None:
        """Mean score on the held-out clips, None for the wall."""
        return math.fsum(self.scores.values()) / len(self.scores) if self.scores else None


def pace_beside(verified: Sequence[Verified], table: LatencyTable) -> float:
    """Return how much slower the machine was than the latency model that predicted has it.

    Args:
        verified: What was measured, dense and the wall first.
        table: With that model.
    """
    timed = [
        (each.latency.median_ms, each.predicted_ms)
        for each in verified
        if each.latency is not None and each.predicted_ms is not None
    ]
    wall = verified[1].latency
    wall_ms = table.wall_ms if wall is None else wall.median_ms
    return pace_of(timed, (wall_ms, table.model.wall_ms(table.layout)))


def time_beside_the_wall(
    judge: Judge,
    schedules: Mapping[str, Schedule],
    images: Tensor,
    *,
    dense: bool = True,
    limit_s: float | None = None,
    progress: Samples = uncounted,
) -> dict[str, Latency]:
    """Time schedules in turns with the wall and, unless told otherwise, with dense.

    Args:
        judge: Says which model.
        schedules: What to time, by name.
        images: A clip of the target length, ``[S, 3, H, W]``.
        dense: Whether to time dense.
        limit_s: About how many seconds to take.
        progress: Told of the samples taken.

    Returns:
        The latencies by name, ``wall`` and ``dense`` among them; what does not fit is left out.
    """
    treatments: dict[str, Treatment] = {"wall": "wall", **schedules}
    if dense:
        treatments["dense"] = "dense"
    return time_passes(
        judge.model,
        images,
        treatments,
        family=judge.family,
        dtype=judge.dtype,
        limit_s=limit_s,
        progress=progress,
    )


def verify(
    judge: Judge,
    decision: Decision,
    held_out: DenseRuns,
    latencies: Mapping[str, Latency],
    progress: Samples = uncounted,
) -> tuple[Verified, ...]:
    """Measure the quality of every finalist on the held-out clips.

    A rival that cannot be run there is left out; if the chosen one cannot, that is an error.

    Args:
        judge: Runs and scores.
        decision: The finalists.
        held_out: The held-out clips.
        latencies: Of dense, the wall and the finalists, by kind.
        progress: Told of the schedules run.

    Returns:
        Dense, the wall, and the finalists.

    Raises:
        PredictionError: If the chosen schedule gives NaN there.
    """
    dense_scores = judge.scores(held_out.qualities, held_out)
    verified = [
        Verified("dense", None, None, latencies.get("dense"), held_out.qualities, dense_scores),
        Verified("wall", None, None, latencies.get("wall"), (), {}),
    ]
    for number, each in enumerate(decision.finalists):
        progress(number, len(decision.finalists))
        try:
            qualities = judge.qualities(each.trial.schedule, held_out)
        except Exception as error:
            if each is decision.chosen or not is_failure(error):
                raise
            continue
        verified.append(
            Verified(
                each.kind,
                each.trial.schedule,
                each.trial.latency_ms,
                latencies.get(each.kind),
                qualities,
                judge.scores(qualities, held_out),
            )
        )
    progress(len(decision.finalists), len(decision.finalists))
    return tuple(verified)
