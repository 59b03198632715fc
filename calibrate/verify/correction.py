"""Settling on a schedule: selection, timing, one correction of the latency model, verification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from spark3r.schedule import Schedule
from spark3r.timing import Latency

from ..budget import time_text
from ..measure.evaluator import DenseRuns, Evaluator
from ..measure.timing import believed_ms, unrest_of
from ..search.optimizer import Found
from ..search.problem import Problem, WithinBudget
from ..settings import Job
from .held_out import Verification, time_beside_the_wall, verify
from .selection import SLACK, Decision, Finalist, best_so_far, choose, finalists, most_faithful

OVER = 0.02
"""Share of the budget by which a measured schedule may exceed it before the model is corrected."""

FINALISTS = 1.5
"""How long the finalists are timed, as a share of what other timings may take."""

SOLVED_AGAIN = 5
"""Proposals of the search that are solved again after that."""


class Searched(Protocol):
    """Goes on with the search."""

    def __call__(
        self, problem: Problem, *, trials: int, others: dict[str, Schedule] | None = None
    ) -> Found:
        """Return all trials so far and those of ``others``."""


@dataclass(frozen=True)
class Settled:
    """What was settled on, and all that was measured of it.

    Attributes:
        problem: The problem, with the latency model that was right in the end.
        found: All trials.
        decision: Which schedule is exported.
        verification: Everything that was measured of it and its rivals, of dense and of the wall.
        interrupted: Whether Ctrl-C cut selection or verification short.
    """

    problem: Problem
    found: Found
    decision: Decision
    verification: Verification
    interrupted: bool = False


@dataclass(frozen=True)
class Means:
    """What settling works with.

    Attributes:
        job: The job.
        evaluator: Runs and scores.
        dense: Dense runs by role.
        images: A clip of the target length, ``[S, 3, H, W]``.
        searched: Goes on with the search.
    """

    job: Job
    evaluator: Evaluator
    dense: Mapping[str, DenseRuns]
    images: Tensor
    searched: Searched


def settle(means: Means, problem: Problem, found: Found) -> Settled:
    """Choose the schedule to export, and verify it and its rivals.

    A schedule that takes more than `OVER` above the budget, or leaves more than `SLACK` of it
    unused where the latency model said that it would not, is replaced, as far as the machine was
    quiet enough to tell (`.unrest.believed_ms`): the model is corrected by what it takes,
    and everything that it decides is decided once more. What comes of that is exported as it is.

    After Ctrl-C what was chosen last is verified alone, or the best of the search where nothing was
    yet; a second one goes through.

    Args:
        means: What to do it with.
        problem: What was searched.
        found: The trials.
    """
    choices: list[tuple[Problem, Found, Decision]] = []
    try:
        return _settle(means, problem, found, choices)
    except KeyboardInterrupt:
        means.job.reporter.say(
            "interrupted: the best so far is verified alone and exported, the study is kept"
        )
        decision = best_so_far(found)
        if choices:
            problem, found, chosen = choices[-1]
            decision = replace(chosen, finalists=(chosen.chosen,))
        latencies = _timed(means, decision, "verification of the best")
        verification = verify(means.evaluator, decision, means.dense["held out"], latencies)
        return Settled(problem, found, decision, verification, interrupted=True)


def _settle(
    means: Means,
    problem: Problem,
    found: Found,
    choices: list[tuple[Problem, Found, Decision]],
) -> Settled:
    """Settle on a schedule; ``choices`` has every decision as soon as it is made."""
    job, evaluator, dense = means.job, means.evaluator, means.dense
    decision = _decided(means, problem, found, "selection")
    choices.append((problem, found, decision))
    latencies = _timed(means, decision, "latency of finalists")
    corrected = corrected_where_missed(job, problem, decision.chosen, latencies)
    if corrected is not None:
        best = [trial for trial in found.ranked() if trial.parameters][:SOLVED_AGAIN]
        again = corrected.solved_again({trial.name: trial.parameters for trial in best})
        more = means.searched(corrected, trials=0, others=again)
        if more.ranked():
            stopped = found.interrupted or more.interrupted
            problem, found = corrected, replace(more, interrupted=stopped)
            decision = _decided(means, problem, found, "selection, corrected", decision.finalists)
            choices.append((problem, found, decision))
            latencies = _timed(means, decision, "latency, corrected", share=1.0)
    progress = job.reporter.step("verification")
    verification = verify(evaluator, decision, dense["held out"], latencies, progress)
    return Settled(problem, found, decision, verification)


def _decided(
    means: Means,
    problem: Problem,
    found: Found,
    step: str,
    earlier: tuple[Finalist, ...] = (),
) -> Decision:
    progress = means.job.reporter.step(step)
    candidates = finalists(found, means.evaluator, means.dense["selection"], progress, earlier)
    if not candidates:
        return most_faithful(found)
    return choose(candidates, problem.goal, means.job.source)


def _timed(
    means: Means, decision: Decision, step: str, share: float = FINALISTS
) -> dict[str, Latency]:
    schedules = {each.kind: each.trial.schedule for each in decision.finalists}
    return time_beside_the_wall(means.job, schedules, means.images, step, share=share)


def corrected_where_missed(
    job: Job, problem: Problem, chosen: Finalist, latencies: Mapping[str, Latency]
) -> Problem | None:
    """Return the problem as it was measured, where the chosen schedule misses the budget.

    Args:
        job: The job.
        problem: The problem.
        chosen: The schedule chosen.
        latencies: Of it, by its kind, and of dense and the wall, measured beside each other.

    Returns:
        The problem with a latency model that is right about the schedule and the wall, as far as
        the timings can tell, and a relative budget taken of dense as it is now; None where nothing
        was missed.
    """
    missed = _missed(job, problem, chosen, latencies)
    if missed is None:
        return None
    allowed_ms, taken_ms = missed
    assert isinstance(problem.goal, WithinBudget)
    slower = allowed_ms / problem.goal.budget_ms
    wall_ms = believed_ms(
        slower * problem.latency.wall_ms(problem.layout),
        latencies["wall"].median_ms,
        unrest_of(latencies),
    )
    measured_ms = latencies[chosen.kind].median_ms
    job.reporter.say(
        f"{chosen.kind} takes {time_text(measured_ms)} where {time_text(allowed_ms)} are allowed "
        f"and {time_text(chosen.trial.latency_ms)} were predicted: the latency model is corrected "
        "and solved once more"
    )
    goal = WithinBudget(allowed_ms)
    return replace(problem, goal=goal).corrected(wall_ms, chosen.trial.schedule, taken_ms)


def _missed(
    job: Job, problem: Problem, chosen: Finalist, latencies: Mapping[str, Latency]
) -> tuple[float, float] | None:
    """Return the milliseconds allowed and taken where the chosen schedule misses, None if not."""
    budget = job.settings.budget
    if budget is None or not latencies.keys() >= {"wall", chosen.kind}:
        return None
    assert isinstance(problem.goal, WithinBudget)
    allowed_ms = problem.goal.budget_ms
    if "dense" in latencies:
        # A share of dense is one of dense as it is now, not as it was before the search.
        allowed_ms = budget.clip_ms(problem.layout.frames, latencies["dense"].median_ms)
    measured_ms = latencies[chosen.kind].median_ms
    predicted_ms = chosen.trial.latency_ms * allowed_ms / problem.goal.budget_ms
    taken_ms = believed_ms(predicted_ms, measured_ms, unrest_of(latencies))
    meant_to_use = chosen.trial.latency_ms >= (1 - SLACK) * problem.goal.budget_ms
    over = taken_ms > (1 + OVER) * allowed_ms
    under = meant_to_use and taken_ms < (1 - SLACK) * allowed_ms
    return (allowed_ms, taken_ms) if over or under else None
