"""The trade-off between latency and quality: other schedules of the search, run on clips."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..defaults import APART, FRONT_POINTS, TRADE_OFF_CLIPS
from ..measure.evaluator import DenseRuns, Evaluator, is_failure
from ..measure.quality import Quality
from ..progress import Progress, no_progress
from ..search.optimizer import Found, Trial
from ..settings import Job
from ..verify.correction import Outcome


@dataclass(frozen=True)
class Point:
    """A schedule of the trade-off between latency and quality.

    Attributes:
        trial: Its trial on the clips of the search.
        qualities: On the clips of the selection.
    """

    trial: Trial
    qualities: tuple[Quality, ...]


@dataclass(frozen=True)
class TradeOffRuns:
    """The schedules of the trade-off.

    Attributes:
        points: Slower and faster schedules than the exported one.
        dense: Quality of the dense run on the clips that the points' figures are from.
        interrupted: Whether Ctrl-C stopped them.
    """

    points: tuple[Point, ...] = ()
    dense: tuple[Quality, ...] = ()
    interrupted: bool = False


def run_trade_off(
    job: Job, evaluator: Evaluator, selection: DenseRuns, outcome: Outcome
) -> TradeOffRuns:
    """Run schedules of the search's trade-off, unless the calibration was interrupted already.

    Args:
        job: The job.
        evaluator: Runs and scores.
        selection: Clips of the selection, of which `TRADE_OFF_CLIPS` are run.
        outcome: The search, and the exported schedule.
    """
    if outcome.interrupted:
        return TradeOffRuns()
    clips, chosen = selection.first(TRADE_OFF_CLIPS), outcome.decision.chosen.trial
    try:
        points = trade_off(outcome.found, chosen, evaluator, clips, job.reporter.step("trade-off"))
    except KeyboardInterrupt:
        job.reporter.say("interrupted: exported without other schedules of the trade-off")
        return TradeOffRuns(interrupted=True)
    return TradeOffRuns(points, clips.qualities if points else ())


def trade_off(
    found: Found,
    chosen: Trial,
    evaluator: Evaluator,
    selection: DenseRuns,
    progress: Progress = no_progress,
) -> tuple[Point, ...]:
    """Return schedules of the search's trade-off, slower and faster ones, run on the selection.

    What cannot be run there is left out.

    Args:
        found: The search.
        chosen: The exported trial; the others differ from it, and from each other, in latency.
        evaluator: Runs and scores.
        selection: Clips of the selection.
        progress: Callback(schedules run, their total).
    """
    kept = [chosen]
    front = [trial for trial in found.front() if trial.schedule != chosen.schedule]
    # The farthest from what is kept first, so that few points span the whole trade-off.
    while front and len(kept) <= FRONT_POINTS:
        gaps = [
            min(abs(math.log(trial.latency_ms / other.latency_ms)) for other in kept)
            for trial in front
        ]
        widest = max(range(len(front)), key=gaps.__getitem__)
        if gaps[widest] < math.log(APART):
            break
        kept.append(front.pop(widest))
    others = sorted(kept[1:], key=lambda trial: trial.latency_ms)
    if not others:
        return ()
    points = []
    for number, trial in enumerate(others):
        progress(number, len(others))
        try:
            points.append(Point(trial, evaluator.qualities(trial.schedule, selection)))
        except Exception as error:
            if not is_failure(error):
                raise
    progress(len(others), len(others))
    return tuple(points)
