"""Selection, timing and correction, from the trials of a search to a verified schedule.

The latency model is corrected by timings twice at most: before the search by the knapsack's answer,
and after the selection if the chosen schedule misses the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from spark3r.timing import Latency

from ..budget import time_text
from ..defaults import FINALISTS_TIMING, OVER, REPEATED_PROPOSALS, SLACK
from ..measure.evaluator import Evaluator, SplitRuns
from ..measure.timing import (
    LatencyTable,
    machine_slowdown,
    relative_spread,
    shrunk_latency_ms,
)
from ..search.optimizer import Found, Optimize
from ..search.problem import LatencyLimit, SearchProblem
from ..settings import Job
from .held_out import Verification, time_beside_the_wall, verify
from .selection import (
    Decision,
    Finalist,
    best_so_far,
    choose,
    most_faithful,
    run_finalists,
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
        optimize: Search, to be continued under a corrected latency model.
        origin: Profile that the measurements are from; None if they were measured.
    """

    job: Job
    evaluator: Evaluator
    dense: SplitRuns
    images: Tensor
    optimize: Optimize
    origin: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """The decision, and its verification.

    Attributes:
        problem: The problem, with the last corrected latency model.
        found: All trials.
        decision: The schedule to export.
        verification: Measurements of it and its rivals, of dense and of the wall.
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

    A model fitted from the wall to dense may be some percent off in between. All schedules of the
    search lie there, as the knapsack's answer does. The budget was resolved before, so the slowdown
    of the machine since then is taken out. Dense and the wall together show it, or the wall alone
    if dense does not fit. (The wall is short, and a single disturbance would shift everything.)
    The less they agree, the less the timing counts.
    """
    answer = problem.knapsack()
    if answer is None:
        return problem
    latencies = time_beside_the_wall(
        job,
        {"knapsack": answer},
        images,
        "latency at the goal",
        dense=not table.dense_extrapolated,
    )
    if not latencies.keys() >= {"wall", "knapsack"}:
        return problem
    predicted_ms = problem.predict_ms(answer)
    before_ms = {"wall": table.wall_ms, "dense": table.dense_ms}
    slowdown, disagreement = machine_slowdown(before_ms, latencies)
    measured_ms = latencies["knapsack"].median_ms / slowdown
    spread = max(relative_spread(table.passes, latencies), disagreement)
    taken_ms = shrunk_latency_ms(predicted_ms, measured_ms, spread)
    job.reporter.say(
        f"the knapsack's schedule takes {measured_ms / predicted_ms:.3f} of its predicted latency; "
        f"timings spread by {spread:.1%}, so the latency model moves by "
        f"{taken_ms / predicted_ms:.3f}"
    )
    return problem.corrected(problem.latency.wall_ms(problem.layout), answer, taken_ms)


def select_and_correct(context: CorrectionContext, problem: SearchProblem, found: Found) -> Outcome:
    """Choose the schedule to export, and verify it and its rivals.

    If the chosen schedule takes more than `OVER` above the budget, or leaves more than `SLACK` of
    it unused although the latency model predicted otherwise, the model is corrected by the timing,
    as far as the machine was quiet enough to tell. Then everything is decided once more. The result
    of that is final.

    After Ctrl-C only the last decision is verified. If there is none yet, the best trial of the
    search is. A second Ctrl-C is raised. If nothing was searched, the first one is raised too,
    because there is no earlier result to fall back on.
    """
    decisions: list[tuple[SearchProblem, Found, Decision]] = []
    try:
        return _select_and_correct(context, problem, found, decisions)
    except KeyboardInterrupt:
        if not found.was_run:
            raise
        context.job.reporter.say(
            "interrupted: the best schedule so far is verified and exported, without its rivals"
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
    """Decide and verify. Append every decision to ``decisions`` as soon as it is made."""
    job = context.job
    decision = _decide(context, problem, found, "selection")
    decisions.append((problem, found, decision))
    share = FINALISTS_TIMING if found.was_run else 1.0
    latencies = _timed(context, decision, "latency of finalists", share)
    corrected = corrected_where_missed(job, problem, decision.chosen, latencies)
    if corrected is not None:
        best = [trial for trial in found.ranked() if trial.parameters][:REPEATED_PROPOSALS]
        repeated = corrected.repeat_proposals({trial.name: trial.parameters for trial in best})
        more = context.optimize(corrected, repeated)
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
    candidates = run_finalists(
        found, context.evaluator, context.dense.validation, progress, earlier
    )
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
    """Return the problem with a corrected latency model, None if the budget is not missed.

    A relative budget counts as a share of dense as it is timed now, not as it was before the
    search. The corrected model is right about the schedule and the wall, as far as the timings can
    tell. They are those of the schedule, by its kind, of dense and of the wall.
    """
    budget, goal = job.settings.budget, problem.goal
    if budget is None or not isinstance(goal, LatencyLimit):
        return None
    if not latencies.keys() >= {"wall", chosen.kind}:
        return None
    allowed_ms = goal.budget_ms
    if "dense" in latencies:
        allowed_ms = budget.clip_ms(problem.layout.frames, latencies["dense"].median_ms)
    slowdown, spread = allowed_ms / goal.budget_ms, relative_spread(latencies)
    predicted_ms = chosen.trial.latency_ms
    measured_ms = latencies[chosen.kind].median_ms
    taken_ms = shrunk_latency_ms(slowdown * predicted_ms, measured_ms, spread)
    is_over = taken_ms > (1 + OVER) * allowed_ms
    meant_to_use = predicted_ms >= (1 - SLACK) * goal.budget_ms
    is_under = meant_to_use and taken_ms < (1 - SLACK) * allowed_ms
    if not (is_over or is_under):
        return None
    job.reporter.say(
        f"{chosen.kind} takes {time_text(measured_ms)} where {time_text(allowed_ms)} are allowed "
        f"and {time_text(predicted_ms)} were predicted: the latency model is corrected, and "
        "everything is solved once more"
    )
    wall_ms = shrunk_latency_ms(
        slowdown * problem.latency.wall_ms(problem.layout), latencies["wall"].median_ms, spread
    )
    moved = replace(problem, goal=LatencyLimit(allowed_ms))
    return moved.corrected(wall_ms, chosen.trial.schedule, taken_ms)
