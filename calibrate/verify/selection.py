"""Selection: which schedule is exported, decided on clips that the search did not see.

Trials are judged on the clips of the search, and the best of many trials on few clips is partly
luck. So the best of each kind run again on other clips, the selection, and there the simpler of two
schedules stays unless the other is better beyond its interval. A budget is there to be used: a
schedule that leaves more than `SLACK` of it unused has to be better in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..defaults import ATTEMPTS, FASTER, SLACK, Source
from ..measure.evaluator import DenseRuns, Evaluator, is_failure
from ..measure.score import LEAST_DEVIATION
from ..measure.statistics import PairedRatio, paired_ratio
from ..progress import Progress, no_progress
from ..search.optimizer import Found, Trial
from ..search.problem import DeviationLimit, Goal, LatencyLimit

KINDS = ("uniform", "paper", "knapsack", "search")
"""Kinds of schedules, the simplest first. A trial's name begins with its kind."""

SOLVED = ("knapsack", "search")
"""Kinds that are solved for a budget. They are solved for tighter ones as well, and on the few
clips of the search one of those may look best: it stands for its kind only if nothing else does."""


@dataclass(frozen=True)
class Finalist:
    """The best schedule of one kind.

    Attributes:
        kind: One of `KINDS`.
        trial: Its trial on the clips of the search.
        selection: Its score on each clip of the selection; empty where that was not run.
        deviation: Its score by deviation there.
    """

    kind: str
    trial: Trial
    selection: Mapping[str, float]
    deviation: Mapping[str, float] = field(default_factory=dict)

    @property
    def selection_score(self) -> float | None:
        """Mean score on the selection, None where that was not run."""
        if not self.selection:
            return None
        return math.fsum(self.selection.values()) / len(self.selection)


@dataclass(frozen=True)
class Decision:
    """Which finalist is exported, and why.

    Attributes:
        finalists: The best of each kind, the simplest kind first.
        chosen: The one to export.
        reasons: One line per comparison.
    """

    finalists: tuple[Finalist, ...]
    chosen: Finalist
    reasons: tuple[str, ...]


def kind_of(trial: Trial) -> str:
    """Return the kind of a trial's schedule."""
    return trial.name.partition(" ")[0]


def finalists(
    found: Found,
    evaluator: Evaluator,
    selection: DenseRuns,
    progress: Progress = no_progress,
    earlier: tuple[Finalist, ...] = (),
) -> tuple[Finalist, ...]:
    """Return the best trial that is allowed of each kind, run again on the selection.

    Where a deviation is the limit, what exceeds it on the selection is left out, as is what cannot
    be run there, and the next best takes its place.

    Args:
        found: The search.
        evaluator: Runs and scores.
        selection: Clips of the selection.
        progress: Callback(kinds done, their total).
        earlier: Finalists of the same clips, which need not run again.
    """
    by_kind = ranked_by_kind(found)
    known = {each.trial.schedule: each for each in earlier if each.selection}
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
            finalist = known.get(trial.schedule) or _selected(kind, trial, evaluator, selection)
            if finalist is None:
                continue
            finalist = replace(finalist, kind=kind, trial=trial)
            if found.goal.excess(trial.latency_ms, finalist.selection_score) <= 0:
                chosen.append(finalist)
                break
            if isinstance(found.goal, DeviationLimit) and finalist.selection_score:
                # As much as it exceeds the limit here, the next one must stay below it there.
                most = trial.score.mean * found.goal.most / finalist.selection_score
    progress(len(by_kind), len(by_kind))
    return tuple(chosen)


def _selected(
    kind: str, trial: Trial, evaluator: Evaluator, selection: DenseRuns
) -> Finalist | None:
    """Return a trial run on the selection, None where it cannot be run."""
    try:
        qualities = evaluator.qualities(trial.schedule, selection)
    except Exception as error:
        if not is_failure(error):
            raise
        return None
    faithful = evaluator.deviations(qualities, selection)
    return Finalist(kind, trial, evaluator.scores(qualities, selection), faithful)


def ranked_by_kind(found: Found) -> dict[str, list[Trial]]:
    """Return the trials that are allowed by kind, the simplest kind first, the best trial first.

    Of what is solved for a budget, trials that use it come before those that do not.
    """
    ranked = found.ranked()
    by_kind = {kind: [trial for trial in ranked if kind_of(trial) == kind] for kind in KINDS}
    if isinstance(found.goal, LatencyLimit):
        least_ms = _least_ms(found.goal)
        for kind in SOLVED:
            by_kind[kind].sort(key=lambda trial: trial.latency_ms < least_ms)
    return {kind: trials for kind, trials in by_kind.items() if trials}


def choose(candidates: tuple[Finalist, ...], goal: Goal, source: Source) -> Decision:
    """Return the simplest finalist that no other beats beyond doubt.

    Args:
        candidates: From `finalists`.
        goal: What was to be reached.
        source: What they are judged by.

    Raises:
        ValueError: If there is no finalist.
    """
    if not candidates:
        raise ValueError("no schedule that is allowed could be run")
    if not isinstance(goal, LatencyLimit):
        return _fastest(candidates)
    least_ms = _least_ms(goal)
    using = [each for each in candidates if each.trial.latency_ms >= least_ms]
    leaving = [each for each in candidates if each.trial.latency_ms < least_ms]
    chosen, *rivals = [*using, *leaving]
    reasons = []
    for rival in rivals:
        is_better, why = _is_better(rival, chosen, source)
        unused = 1 - rival.trial.latency_ms / goal.budget_ms
        note = f" (it leaves {unused:.0%} of the budget unused)" if rival in leaving else ""
        reasons.append(f"{rival.kind}{note} against {chosen.kind} on the selection: {why}")
        if is_better:
            chosen = rival
    return Decision(candidates, chosen, tuple(reasons))


def solved(found: Found, origin: str) -> Decision:
    """Return the decision for the knapsack's answer, which did not run on any clip.

    Args:
        found: From `calibrate.search.optimizer.solve`.
        origin: Name of the profile that the measurements are from.
    """
    return _alone(found.trials[0], f"solved by the sensitivities and the latency model of {origin}")


def best_so_far(found: Found) -> Decision:
    """Return the decision for the best trial of the search alone, without a selection."""
    return _alone(
        found.ranked()[0],
        "interrupted before the selection: the best on the clips of the search",
    )


def most_faithful(found: Found) -> Decision:
    """Return the decision where nothing that ran on the selection is allowed there.

    Of the trials that are allowed on the clips of the search it is the one of least score: within a
    deviation dense itself, if nothing else.
    """
    ranked = [trial for trial in found.ranked() if trial.score is not None]
    return _alone(
        min(ranked, key=lambda trial: trial.score.mean if trial.score else math.inf),
        "no schedule that ran on the selection is allowed there: the one of least score on the "
        "clips of the search",
    )


def _least_ms(goal: LatencyLimit) -> float:
    """Return the latency below which a schedule leaves too much of the budget unused."""
    return (1 - SLACK) * goal.budget_ms


def _alone(trial: Trial, reason: str) -> Decision:
    finalist = Finalist(kind_of(trial), trial, {})
    return Decision((finalist,), finalist, (reason,))


def _is_better(rival: Finalist, chosen: Finalist, source: Source) -> tuple[bool, str]:
    """Return whether a finalist beats a simpler one beyond doubt, and why."""
    compared = ratio(rival.selection, chosen.selection, source)
    if compared.is_lower:
        return True, f"{compared}, better beyond its interval"
    if compared.is_higher or source == "deviation" or not (rival.deviation and chosen.deviation):
        return False, f"{compared}, not better beyond its interval"
    faithful = ratio(rival.deviation, chosen.deviation, "deviation")
    if faithful.is_lower:
        return (
            True,
            f"{compared}, which does not tell; more faithful beyond its interval: {faithful}",
        )
    return False, f"{compared}, not better beyond its interval, nor more faithful"


def ratio(
    candidate: Mapping[str, float], baseline: Mapping[str, float], source: Source
) -> PairedRatio:
    """Compare scores clip by clip: deviations as they are, others are logarithms of ratios."""
    if source == "deviation":
        return paired_ratio(candidate, baseline, tolerance=LEAST_DEVIATION)
    ratios = (
        {clip: math.exp(each) for clip, each in scores.items()} for scores in (candidate, baseline)
    )
    return paired_ratio(*ratios)


def _fastest(candidates: tuple[Finalist, ...]) -> Decision:
    chosen, reasons = candidates[0], []
    for rival in candidates[1:]:
        share = rival.trial.latency_ms / chosen.trial.latency_ms
        reasons.append(
            f"{rival.kind} takes {share:.3f} times as long as {chosen.kind}; both are faithful "
            "enough on the selection"
        )
        if share < FASTER:
            chosen = rival
    return Decision(candidates, chosen, tuple(reasons))
