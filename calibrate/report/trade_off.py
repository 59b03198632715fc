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
        trial: Its trial on the search clips.
        qualities: Quality on some validation clips.
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
    job: Job, evaluator: Evaluator, validation: DenseRuns, outcome: Outcome
) -> TradeOffRuns:
    """Run schedules of the search's trade-off, unless the calibration was interrupted already.

    Args:
        job: The job.
        evaluator: Runs and scores.
        validation: Dense runs of the validation clips, of which `TRADE_OFF_CLIPS` are taken.
        outcome: The search, and the exported schedule.
    """
    if outcome.interrupted:
        return TradeOffRuns()
    clips, chosen = validation.first(TRADE_OFF_CLIPS), outcome.decision.chosen.trial
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
    validation: DenseRuns,
    progress: Progress = no_progress,
) -> tuple[Point, ...]:
    """Return slower and faster schedules of the search's trade-off, run on validation clips.

    Schedules that fail there are left out.

    Args:
        found: The search.
        chosen: The exported trial. The others differ from it, and from each other, in latency.
        evaluator: Runs and scores.
        validation: Dense runs of the clips.
        progress: Callback(schedules run, their total).
    """
    taken = [chosen]
    front = [trial for trial in found.front() if trial.schedule != chosen.schedule]
    # The point farthest from those taken comes next, so that few points span the trade-off.
    while front and len(taken) <= FRONT_POINTS:
        gaps = [
            min(abs(math.log(trial.latency_ms / other.latency_ms)) for other in taken)
            for trial in front
        ]
        widest = max(range(len(front)), key=gaps.__getitem__)
        if gaps[widest] < math.log(APART):
            break
        taken.append(front.pop(widest))
    others = sorted(taken[1:], key=lambda trial: trial.latency_ms)
    if not others:
        return ()
    points = []
    for number, trial in enumerate(others):
        progress(number, len(others))
        try:
            points.append(Point(trial, evaluator.qualities(trial.schedule, validation)))
        except Exception as error:
            if not is_failure(error):
                raise
    progress(len(others), len(others))
    return tuple(points)
