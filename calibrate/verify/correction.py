"""Selection, timing and correction, from the trials of a search to a verified schedule.

The latency model is corrected by timings: before the search by the knapsack's answer, and after the
selection if the chosen schedule misses the budget. Then the next schedule that holds is tried.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeGuard

from spark3r.schedule import Schedule
from spark3r.timing import VERY_LONG_S, Latency

from ..budget import time_text
from ..defaults import CORRECT_BELOW, LEAST_SAMPLES, OVER, REPEATED_PROPOSALS, RETRIES
from ..measure.evaluator import Evaluator, SplitRuns
from ..measure.measurements import Latencies
from ..measure.pace import time_at_pace
from ..measure.timing import TimedPass
from ..search.optimizer import Found, Optimize
from ..search.problem import Goal, LatencyLimit, SearchProblem
from ..settings import Job
from .held_out import Verification, verify
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
        times: Latencies of schedules at the target length.
        optimize: Search, to be continued under a corrected latency model.
        origin: Profile that the measurements are from; None if they were measured.
    """

    job: Job
    evaluator: Evaluator
    dense: SplitRuns
    times: TargetTimes
    optimize: Optimize
    origin: Path | None = None


@dataclass(frozen=True)
class TargetTimes:
    """Latencies of schedules at the target length, at the pace of the latency model.

    A schedule that is timed again adds to its samples.

    Attributes:
        job: The job.
        latencies: Latencies of dense and the wall, and the pass that shows the pace.
        samples: Latency by schedule, as far as schedules were timed and fit into memory.
        slowdowns: How much slower the machine was when they were taken, in order.
        errors: Measured ÷ predicted latency of the first schedule that was timed, as ``answer``.
    """

    job: Job
    latencies: Latencies
    samples: dict[Schedule, Latency] = field(default_factory=dict)
    slowdowns: list[float] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def judged(self, schedule: Schedule, step: str, goal: Goal) -> Latency | None:
        """Return the latency by which a schedule is judged: `LEAST_SAMPLES`, or a long one.

        One sample of `VERY_LONG_S` is enough if it does not miss the budget. A schedule is never
        judged to miss it by fewer than `LEAST_SAMPLES`.
        """
        if not is_long(goal):
            return self.of(schedule, step)
        first = self.of(schedule, step, 1)
        most_ms = (1 + OVER) * goal.budget_ms
        if first is None or 1000 * VERY_LONG_S <= first.median_ms <= most_ms:
            return first
        return self.of(schedule, step)

    def of(self, schedule: Schedule, step: str, least: int = LEAST_SAMPLES) -> Latency | None:
        """Return the latency of a schedule with at least as many samples, timed where needed.

        None is returned if it does not fit into memory.
        """
        before = self.samples.get(schedule)
        if before is not None and before.n >= least:
            return before
        missing = least - (0 if before is None else before.n)
        timed = time_at_pace(
            self.job,
            self.latencies.pace,
            self.latencies.table.model,
            [TimedPass("schedule", schedule, self.latencies.images, least=missing)],
            step,
        )
        self.slowdowns.append(timed.slowdown)
        now = timed.latencies.get("schedule")
        if now is not None:
            kept = () if before is None else before.samples_ms
            self.samples[schedule] = Latency((*kept, *now.samples_ms), now.busy)
        return self.samples.get(schedule)


@dataclass(frozen=True)
class Outcome:
    """The decision, and its verification.

    Attributes:
        problem: The problem, with the last corrected latency model.
        found: All trials.
        decision: The schedule to export.
        verification: Measurements of it and its rivals, of dense and of the wall.
        times: Latencies of schedules at the target length.
        interrupted: Whether Ctrl-C cut selection or verification short.
    """

    problem: SearchProblem
    found: Found
    decision: Decision
    verification: Verification
    times: TargetTimes
    interrupted: bool = False


def correct_at_goal(problem: SearchProblem, times: TargetTimes, least: int) -> SearchProblem:
    """Return the problem with its latency model corrected by the timing of the knapsack's answer.

    The model may be some percent off between the wall and dense, and more where it is extended far.
    All schedules of the search lie there, as the knapsack's answer does. An answer that takes
    between `CORRECT_BELOW` and all of the budget, or `OVER` more, corrects nothing, so that it can
    be exported as it was timed.

    Args:
        problem: The problem.
        times: Latencies of schedules at the target length.
        least: Samples of the answer that are taken whatever the time limit; one is enough for a
            budget of `VERY_LONG_S`.
    """
    answer = problem.knapsack()
    least = 1 if is_long(problem.goal) else least
    latency = None if answer is None else times.of(answer, "latency at the goal", least)
    if answer is None or latency is None:
        return problem
    predicted_ms, measured_ms = problem.predict_ms(answer), latency.median_ms
    ratio = measured_ms / predicted_ms
    times.errors["answer"] = ratio
    line = f"the knapsack's schedule takes {ratio:.3f} of its predicted latency"
    goal = problem.goal
    holds = isinstance(goal, LatencyLimit) and (
        CORRECT_BELOW * goal.budget_ms <= measured_ms <= (1 + OVER) * goal.budget_ms
    )
    times.job.reporter.say(line if holds else f"{line}, and the latency model is corrected by that")
    if holds:
        return problem
    wall_ms = problem.latency.wall_ms(problem.layout)
    return problem.corrected(wall_ms, answer, measured_ms)


def select_and_correct(context: CorrectionContext, problem: SearchProblem, found: Found) -> Outcome:
    """Choose the schedule to export, time it, and verify it and its rivals.

    If the median of at least `LEAST_SAMPLES` timings is more than `OVER` above the budget, the
    latency model is corrected by them, and the next schedule that holds is tried, at most `RETRIES`
    times. The last one tried is exported, and the result says that it misses the budget.

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
        context.times.of(decision.chosen.trial.schedule, "latency of the best")
        verification = _verify(context, decision)
        return Outcome(problem, found, decision, verification, context.times, interrupted=True)


def _select_and_correct(
    context: CorrectionContext,
    problem: SearchProblem,
    found: Found,
    decisions: list[tuple[SearchProblem, Found, Decision]],
) -> Outcome:
    """Decide and verify. Append every decision to ``decisions`` as soon as it is made."""
    job = context.job
    earlier: tuple[Finalist, ...] = ()
    for attempt in range(1 + RETRIES):
        number = f", {attempt + 1}" if attempt else ""
        decision = _decide(context, problem, found, f"selection{number}", earlier)
        decisions.append((problem, found, decision))
        earlier = (*earlier, *decision.finalists)
        chosen = decision.chosen.trial
        step = f"latency of the answer{number}"
        latency = context.times.judged(chosen.schedule, step, problem.goal)
        if latency is not None:
            job.reporter.say(
                f"{decision.chosen.kind}: predicted {time_text(chosen.latency_ms)}, measured "
                f"{time_text(latency.median_ms)} ({latency.median_ms / chosen.latency_ms:.2f})"
            )
        if latency is None or not misses(problem, latency) or attempt == RETRIES or job.is_late:
            break
        job.reporter.say(
            f"{decision.chosen.kind} misses the budget: the latency model is corrected, and the "
            "next schedule that holds is tried"
        )
        wall_ms = problem.latency.wall_ms(problem.layout)
        corrected = problem.corrected(wall_ms, chosen.schedule, latency.median_ms)
        best = [trial for trial in found.ranked() if trial.parameters][:REPEATED_PROPOSALS]
        repeated = corrected.repeat_proposals({trial.name: trial.parameters for trial in best})
        more = context.optimize(corrected, repeated)
        if not more.is_usable:
            break
        stopped = found.interrupted or more.interrupted
        problem, found = corrected, replace(more, interrupted=stopped)
    return Outcome(problem, found, decision, _verify(context, decision), context.times)


def is_long(goal: Goal) -> TypeGuard[LatencyLimit]:
    """Return whether passes within a budget are so long that one of them can be enough."""
    return isinstance(goal, LatencyLimit) and goal.budget_ms >= 1000 * VERY_LONG_S


def misses(problem: SearchProblem, latency: Latency) -> bool:
    """Return whether a schedule's latency at the target length exceeds the budget."""
    goal = problem.goal
    return isinstance(goal, LatencyLimit) and latency.median_ms > (1 + OVER) * goal.budget_ms


def _verify(context: CorrectionContext, decision: Decision) -> Verification:
    return verify(
        context.evaluator,
        decision,
        context.dense.held_out,
        context.times.latencies.table,
        context.times.samples,
        context.job.reporter.step("verification"),
    )


def _decide(
    context: CorrectionContext,
    problem: SearchProblem,
    found: Found,
    step: str,
    earlier: tuple[Finalist, ...] = (),
) -> Decision:
    if not found.was_run:
        return solved(found, None if context.origin is None else context.origin.name)
    progress = context.job.reporter.step(step)
    candidates = run_finalists(
        found, context.evaluator, context.dense.validation, progress, earlier
    )
    if not candidates:
        return most_faithful(found)
    return choose(candidates, problem.goal, context.job.source)
