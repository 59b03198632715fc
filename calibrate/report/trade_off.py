"""The trade-off between latency and quality: other schedules of the search, run on clips."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..defaults import APART, FRONT_POINTS, TRADE_OFF_CLIPS
from ..measure.evaluator import DenseRuns, Evaluator, is_failure
from ..measure.quality import Quality
from ..search.optimizer import Found, Trial
from ..settings import Job
from ..verify.correction import Outcome


@dataclass(frozen=True)
class TradeOff:
    """Slower and faster schedules than the exported one.

    Attributes:
        points: Trials of the search with their quality on some validation clips.
        dense: Quality of the dense run on these clips.
        interrupted: Whether Ctrl-C stopped their runs.
    """

    points: tuple[tuple[Trial, tuple[Quality, ...]], ...] = ()
    dense: tuple[Quality, ...] = ()
    interrupted: bool = False


def run_trade_off(
    job: Job, evaluator: Evaluator, validation: DenseRuns, outcome: Outcome
) -> TradeOff:
    """Run schedules of the trade-off on `TRADE_OFF_CLIPS` validation clips.

    Schedules that fail are left out. After Ctrl-C, or the time limit, there are none.
    """
    trials = points(outcome.found, outcome.decision.chosen.trial)
    if outcome.interrupted or job.is_late or not trials:
        return TradeOff()
    clips, found = validation.first(TRADE_OFF_CLIPS), []
    progress = job.reporter.step("trade-off")
    try:
        for number, trial in enumerate(trials):
            progress(number, len(trials))
            try:
                found.append((trial, evaluator.qualities(trial.schedule, clips)))
            except Exception as error:
                if not is_failure(error):
                    raise
        progress(len(trials), len(trials))
    except KeyboardInterrupt:
        job.reporter.say("interrupted: exported without other schedules of the trade-off")
        return TradeOff(interrupted=True)
    return TradeOff(tuple(found), clips.qualities if found else ())


def points(found: Found, chosen: Trial) -> list[Trial]:
    """Return a few trials of a search's trade-off, from the fastest to the slowest.

    They differ from the exported trial, and from each other, in latency.
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
    return sorted(taken[1:], key=lambda trial: trial.latency_ms)
