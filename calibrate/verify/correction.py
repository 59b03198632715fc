"""Selection, timing, and at most one correction of the latency model by what was timed.

The latency model is corrected twice at most: before the search by the knapsack's answer, and after
the selection if the chosen schedule misses the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from spark3r.timing import Latency

from ..budget import time_text
from ..defaults import FINALISTS_TIMING, OVER, RESOLVED_PROPOSALS, SLACK
from ..measure.evaluator import Evaluator, SplitRuns
from ..measure.timing import LatencyTable, believed_ms, drift_of, unrest_of
from ..search.optimizer import Found, Optimize
from ..search.problem import LatencyLimit, SearchProblem
from ..settings import Job
from .held_out import Verification, time_beside_the_wall, verify
from .selection import (
    Decision,
    Finalist,
    best_so_far,
    choose,
    finalists,
    most_faithful,
    solved,
)


@dataclass(frozen=True)
class CorrectionContext:
    """Everything that selection, timing and correction work with.

    Attributes:
        job: The job.
        evaluator: Runs and scores.
        dense: Dense runs by role.
        images: A clip of the target length, ``[S, 3, H, W]``.
        optimize: Searches once more, under a corrected latency model.
        origin: The profile that the measurements are from; None where they were measured.
    """

    job: Job
    evaluator: Evaluator
    dense: SplitRuns
    images: Tensor
    optimize: Optimize
    origin: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """The decision, and everything that was measured of it.

    Attributes:
        problem: The problem, with the latency model that was right in the end.
        found: All trials.
        decision: Which schedule is exported.
        verification: Everything that was measured of it and its rivals, of dense and of the wall.
        interrupted: Whether Ctrl-C cut selection or verification short.
    """

    problem: SearchProblem
    found: Found
    decision: Decision
    verification: Verification
    interrupted: bool = False


def correct_at_goal(
    job: Job, problem: SearchProblem, table: LatencyTable, images: Tensor
) -> SearchProblem:
    """Return the problem with its latency model corrected by the timing of the knapsack's answer.

    A model fitted from the wall to dense may be some percent off in between, where every schedule
    of the search lies, as the knapsack's answer does. If the machine has become slower or faster
    since the fit, that is taken out, because the budget was resolved before: dense and the wall
    together show it, or the wall alone where dense does not fit. (The wall is short, and a
    disturbed one would shift everything.) The less they agree on that, the less the timing counts.

    Args:
        job: The job.
        problem: The problem.
        table: The timings that its latency model was fitted to.
        images: A clip of the target length, ``[S, 3, H, W]``.
    """
    seed = problem.knapsack()
    if seed is None:
        return problem
    latencies = time_beside_the_wall(
        job,
        {"knapsack": seed},
        images,
        "latency at the goal",
        dense=not table.dense_extrapolated,
    )
    if not latencies.keys() >= {"wall", "knapsack"}:
        return problem
    wall_ms, predicted_ms = problem.latency.wall_ms(problem.layout), problem.predict_ms(seed)
    slower, unsure = drift_of({"wall": table.wall_ms, "dense": table.dense_ms}, latencies)
    measured_ms = latencies["knapsack"].median_ms / slower
    unrest = max(unrest_of(table.passes, latencies), unsure)
    taken_ms = believed_ms(predicted_ms, measured_ms, unrest)
    job.reporter.say(
        f"the knapsack's schedule takes {measured_ms / predicted_ms:.3f} of what is predicted; "
        f"timings differ by {unrest:.1%}, so that {taken_ms / predicted_ms:.3f} is believed"
    )
    return problem.corrected(wall_ms, seed, taken_ms)


def select_and_correct(context: CorrectionContext, problem: SearchProblem, found: Found) -> Outcome:
    """Choose the schedule to export, and verify it and its rivals.

    A schedule that takes more than `OVER` above the budget, or leaves more than `SLACK` of it
    unused although the latency model predicted otherwise, is replaced, as far as the machine was
    quiet enough to tell: the model is corrected by the timing, and everything is decided once more.
    The result of that is exported as it is.

    After Ctrl-C the last decision is verified alone, or the best trial of the search if there was
    no decision yet. A second Ctrl-C is raised, as is the first one if nothing was searched: then
    there is nothing but the answer that was interrupted.

    Args:
        context: Everything to work with.
        problem: The problem.
        found: The trials.
    """
    decisions: list[tuple[SearchProblem, Found, Decision]] = []
    try:
        return _select_and_correct(context, problem, found, decisions)
    except KeyboardInterrupt:
        if not found.was_run:
            raise
        context.job.reporter.say(
            "interrupted: the best so far is verified alone and exported, the study is kept"
        )
        decision = best_so_far(found)
        if decisions:
            problem, found, chosen = decisions[-1]
            decision = replace(chosen, finalists=(chosen.chosen,))
        latencies = _timed(context, decision, "verification of the best")
        verification = verify(context.evaluator, decision, context.dense.held_out, latencies)
        return Outcome(problem, found, decision, verification, interrupted=True)


def _select_and_correct(
    context: CorrectionContext,
    problem: SearchProblem,
    found: Found,
    decisions: list[tuple[SearchProblem, Found, Decision]],
) -> Outcome:
    """Decide and verify; every decision is appended to ``decisions`` as soon as it is made."""
    job = context.job
    decision = _decide(context, problem, found, "selection")
    decisions.append((problem, found, decision))
    share = FINALISTS_TIMING if found.was_run else 1.0
    latencies = _timed(context, decision, "latency of finalists", share)
    corrected = corrected_where_missed(job, problem, decision.chosen, latencies)
    if corrected is not None:
        best = [trial for trial in found.ranked() if trial.parameters][:RESOLVED_PROPOSALS]
        resolved = corrected.resolve_proposals({trial.name: trial.parameters for trial in best})
        more = context.optimize(corrected, resolved=resolved)
        if more.is_usable:
            stopped = found.interrupted or more.interrupted
            problem, found = corrected, replace(more, interrupted=stopped)
            decision = _decide(context, problem, found, "selection, corrected", decision.finalists)
            decisions.append((problem, found, decision))
            latencies = _timed(context, decision, "latency, corrected")
    if (taken := latencies.get(decision.chosen.kind)) is not None:
        predicted_ms = decision.chosen.trial.latency_ms
        job.reporter.say(
            f"{decision.chosen.kind}: predicted {time_text(predicted_ms)}, measured "
            f"{time_text(taken.median_ms)} ({taken.median_ms / predicted_ms:.2f})"
        )
    progress = job.reporter.step("verification")
    held_out = context.dense.held_out
    verification = verify(context.evaluator, decision, held_out, latencies, progress)
    return Outcome(problem, found, decision, verification)


def _decide(
    context: CorrectionContext,
    problem: SearchProblem,
    found: Found,
    step: str,
    earlier: tuple[Finalist, ...] = (),
) -> Decision:
    if context.origin is not None:
        return solved(found, context.origin.name)
    progress = context.job.reporter.step(step)
    candidates = finalists(found, context.evaluator, context.dense.selection, progress, earlier)
    if not candidates:
        return most_faithful(found)
    return choose(candidates, problem.goal, context.job.source)


def _timed(
    context: CorrectionContext, decision: Decision, step: str, share: float = 1.0
) -> dict[str, Latency]:
    schedules = {each.kind: each.trial.schedule for each in decision.finalists}
    return time_beside_the_wall(context.job, schedules, context.images, step, share=share)


def corrected_where_missed(
    job: Job, problem: SearchProblem, chosen: Finalist, latencies: Mapping[str, Latency]
) -> SearchProblem | None:
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
    assert isinstance(problem.goal, LatencyLimit)
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
    goal = LatencyLimit(allowed_ms)
    return replace(problem, goal=goal).corrected(wall_ms, chosen.trial.schedule, taken_ms)


def _missed(
    job: Job, problem: SearchProblem, chosen: Finalist, latencies: Mapping[str, Latency]
) -> tuple[float, float] | None:
    """Return the milliseconds allowed and taken where the chosen schedule misses, None if not."""
    budget = job.settings.budget
    if budget is None or not latencies.keys() >= {"wall", chosen.kind}:
        return None
    assert isinstance(problem.goal, LatencyLimit)
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
