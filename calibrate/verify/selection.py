"""Selection of the exported schedule on validation clips, which the search did not see.

Trials are judged on the search clips, and the best of many trials on few clips is partly luck. So
the best trial of each kind runs again on the validation clips. There the simpler of two schedules
is selected unless the other is better beyond its confidence interval. A budget is there to be used:
a schedule that leaves more than `SLACK` of it unused must be better in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..defaults import ATTEMPTS, FASTER, KINDS, SLACK, Source
from ..measure.evaluator import DenseRuns, Evaluator, is_failure
from ..measure.score import LEAST_DEVIATION
from ..measure.statistics import PairedRatio, paired_ratio
from ..progress import Progress, no_progress
from ..search.optimizer import Found, Trial
from ..search.problem import DeviationLimit, Goal, LatencyLimit

SOLVED = ("knapsack", "search")
"""Kinds that are solved for a budget, and for tighter ones as well. On the few search clips a
schedule for a tighter budget may look best. It represents its kind only if there is no other."""


@dataclass(frozen=True)
class Finalist:
    """The best schedule of one kind.

    Attributes:
        kind: One of `KINDS`.
        trial: Its trial on the search clips.
        validation: Score on each validation clip; empty if it did not run there.
        deviation: Score by deviation on each validation clip.
    """

    kind: str
    trial: Trial
    validation: Mapping[str, float]
    deviation: Mapping[str, float] = field(default_factory=dict)

    @property
    def validation_score(self) -> float | None:
        """Mean score on the validation clips, None if it did not run there."""
        if not self.validation:
            return None
        return math.fsum(self.validation.values()) / len(self.validation)


@dataclass(frozen=True)
class Decision:
    """The finalist to export, and the reasons for it.

    Attributes:
        finalists: The best of each kind, the simplest kind first.
        chosen: The finalist to export.
        reasons: One line per comparison.
    """

    finalists: tuple[Finalist, ...]
    chosen: Finalist
    reasons: tuple[str, ...]


def kind_of(trial: Trial) -> str:
    """Return the kind of a trial's schedule."""
    return trial.name.partition(" ")[0]


def run_finalists(
    found: Found,
    evaluator: Evaluator,
    validation: DenseRuns,
    progress: Progress = no_progress,
    earlier: tuple[Finalist, ...] = (),
) -> tuple[Finalist, ...]:
    """Return the best allowed trial of each kind, run again on the validation clips.

    A trial that fails there, or exceeds the allowed deviation there, is replaced by the next best.
    Schedules that were finalists on these clips before (``earlier``) do not run again.
    """
    by_kind = ranked_by_kind(found)
    known = {each.trial.schedule: each for each in earlier if each.validation}
    chosen = []
    for number, (kind, trials) in enumerate(by_kind.items()):
        progress(number, len(by_kind))
        attempts, most = 0, math.inf
        for trial in trials:
            if attempts == ATTEMPTS:
                break
            if trial.score is None or trial.score.mean > most:
                continue
            attempts += 1
            finalist = known.get(trial.schedule) or _validated(kind, trial, evaluator, validation)
            if finalist is None:
                continue
            finalist = replace(finalist, kind=kind, trial=trial)
            if found.goal.excess(trial.latency_ms, finalist.validation_score) <= 0:
                chosen.append(finalist)
                break
            if isinstance(found.goal, DeviationLimit) and finalist.validation_score:
                # The next one must stay below the limit by the ratio by which this one exceeds it.
                most = trial.score.mean * found.goal.most / finalist.validation_score
    progress(len(by_kind), len(by_kind))
    return tuple(chosen)


def _validated(
    kind: str, trial: Trial, evaluator: Evaluator, validation: DenseRuns
) -> Finalist | None:
    """Return a trial run on the validation clips, None if it fails there."""
    try:
        qualities = evaluator.qualities(trial.schedule, validation)
    except Exception as error:
        if not is_failure(error):
            raise
        return None
    deviations = evaluator.deviations(qualities, validation)
    return Finalist(kind, trial, evaluator.scores(qualities, validation), deviations)


def ranked_by_kind(found: Found) -> dict[str, list[Trial]]:
    """Return the allowed trials by kind, the simplest kind first and the best trial first.

    Among kinds that are solved for a budget, trials that use the budget come first.
    """
    ranked = found.ranked()
    by_kind = {kind: [trial for trial in ranked if kind_of(trial) == kind] for kind in KINDS}
    if isinstance(found.goal, LatencyLimit):
        least_ms = _least_ms(found.goal)
        for kind in SOLVED:
            by_kind[kind].sort(key=lambda trial: trial.latency_ms < least_ms)
    return {kind: trials for kind, trials in by_kind.items() if trials}


def choose(finalists: tuple[Finalist, ...], goal: Goal, source: Source) -> Decision:
    """Return the simplest finalist that no other beats beyond its confidence interval.

    Raises:
        ValueError: If there is no finalist.
    """
    if not finalists:
        raise ValueError("there is no finalist to choose from")
    if not isinstance(goal, LatencyLimit):
        return _fastest(finalists)
    least_ms = _least_ms(goal)
    using = [each for each in finalists if each.trial.latency_ms >= least_ms]
    leaving = [each for each in finalists if each.trial.latency_ms < least_ms]
    chosen, *rivals = [*using, *leaving]
    reasons = []
    for rival in rivals:
        is_better, why = _is_better(rival, chosen, source)
        unused = 1 - rival.trial.latency_ms / goal.budget_ms
        note = f" (it leaves {unused:.0%} of the budget unused)" if rival in leaving else ""
        reasons.append(f"{rival.kind}{note} against {chosen.kind} on the validation clips: {why}")
        if is_better:
            chosen = rival
    return Decision(finalists, chosen, tuple(reasons))


def solved(found: Found, origin: str | None) -> Decision:
    """Return the decision for the knapsack's answer, which ran on no clip.

    Args:
        found: The answer.
        origin: Name of the profile that the measurements are from; None if they were measured.
    """
    reason = "solved by the sensitivities and the latency model"
    reason += ", without a search" if origin is None else f" of {origin}"
    return _only(found.trials[0], reason)


def best_so_far(found: Found) -> Decision:
    """Return the decision for the best trial on the search clips, without validation."""
    return _only(
        found.ranked()[0],
        "interrupted before the selection: this is the best schedule on the search clips",
    )


def most_faithful(found: Found) -> Decision:
    """Return the decision if no trial that ran on the validation clips is allowed there.

    It is the trial of least score among those that are allowed on the search clips. Within a
    deviation that is dense itself, if nothing else.
    """
    ranked = [trial for trial in found.ranked() if trial.score is not None]
    return _only(
        min(ranked, key=lambda trial: trial.score.mean if trial.score else math.inf),
        "no schedule that ran on the validation clips is allowed there: this is the one of least "
        "score on the search clips",
    )


def _least_ms(goal: LatencyLimit) -> float:
    """Return the latency below which a schedule leaves too much of the budget unused."""
    return (1 - SLACK) * goal.budget_ms


def _only(trial: Trial, reason: str) -> Decision:
    finalist = Finalist(kind_of(trial), trial, {})
    return Decision((finalist,), finalist, (reason,))


def _is_better(rival: Finalist, chosen: Finalist, source: Source) -> tuple[bool, str]:
    """Return whether a finalist beats a simpler one beyond its interval, and why."""
    compared = ratio(rival.validation, chosen.validation, source)
    if compared.is_lower:
        return True, f"{compared}, better beyond its interval"
    if compared.is_higher or source == "deviation" or not (rival.deviation and chosen.deviation):
        return False, f"{compared}, not better beyond its interval"
    deviation = ratio(rival.deviation, chosen.deviation, "deviation")
    if deviation.is_lower:
        return (
            True,
            f"{compared}, undecided; more faithful beyond its interval: {deviation}",
        )
    return False, f"{compared}, not better beyond its interval, nor more faithful"


def ratio(
    candidate: Mapping[str, float], baseline: Mapping[str, float], source: Source
) -> PairedRatio:
    """Compare scores clip by clip: deviations by their ratio, other scores as log ratios."""
    if source == "deviation":
        return paired_ratio(candidate, baseline, tolerance=LEAST_DEVIATION)
    ratios = (
        {clip: math.exp(each) for clip, each in scores.items()} for scores in (candidate, baseline)
    )
    return paired_ratio(*ratios)


def _fastest(finalists: tuple[Finalist, ...]) -> Decision:
    chosen, reasons = finalists[0], []
    for rival in finalists[1:]:
        share = rival.trial.latency_ms / chosen.trial.latency_ms
        reasons.append(
            f"{rival.kind} takes {share:.3f} times as long as {chosen.kind}; both are faithful "
            "enough on the validation clips"
        )
        if share < FASTER:
            chosen = rival
    return Decision(finalists, chosen, tuple(reasons))
