"""Another budget from a profile: its sensitivities and latency model, solved again.

Nothing of either is measured. The knapsack's answer is timed beside dense and the wall; where it
misses the budget, the latency model is corrected by that and solved once more. What comes out is
run on the held-out clips.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from spark3r.env import device_name
from spark3r.errors import ProfileError
from spark3r.fingerprint import describe
from spark3r.inference import device_of, layout_of, precision_of
from spark3r.layout import TokenLayout
from spark3r.precision import dtype_name
from spark3r.profile import Profile
from spark3r.profile.evidence import Measurement
from spark3r.schedule import LengthRule, Schedule
from spark3r.timing import Latency

from .budget import resolve, time_text
from .export import Evidence, make_profile
from .goal import Goal, WithinBudget, WithinDeviation
from .judge import Judge
from .kept import kept, recorded_runs
from .latency import FORM, LatencyModel
from .latency_timing import LatencyTable
from .problem import Problem, least_ms
from .profiling import dense_runs
from .records import sensitivity_table
from .result import Calibration, as_budget, dense_result
from .search import Trial
from .selection import Decision, Finalist
from .settings import Job
from .settling import corrected_where_missed
from .splits import Split
from .target_length import clip_of_length
from .unrest import pace_of
from .verify import time_beside_the_wall, verify


def solve_from(path: Path, job: Job, split: Split) -> Calibration:
    """Solve for a goal by what a profile holds, and verify the answer.

    Args:
        path: The profile, measured on the job's model.
        job: The job.
        split: Clips by role; only the held-out ones are run.

    Raises:
        UnreachableBudgetError: If the budget cannot be reached.
        ProfileError: If the profile was measured on something else, or lacks what is needed.
        SensitivityError: If it has no sensitivities of the source that is to be judged by.
    """
    settings = job.settings
    split = replace(split, search=(), selection=())  # these are not run, and stand for nothing
    footage = split.held_out[0].images
    profile = Profile.load(path)
    measurement = _measurement(path, profile, job, footage)
    sensitivity = sensitivity_table(profile.sensitivity, settings.objective)
    if sensitivity.empty:
        known = ", ".join(sorted({record.metric for record in profile.sensitivity}))
        raise ProfileError(
            f"{path}: has no sensitivities of --objective {settings.objective} (only {known}); "
            "calibrate without --from"
        )
    frames = settings.target_frames or measurement.frames
    images = clip_of_length(footage, frames)
    layout = layout_of(job.model, images, job.family, job.dtype)
    table = _table(path, measurement, layout, job.depth)
    least = profile.schedule().length.min_frames
    if split.shortest < least:
        raise ProfileError(
            f"{path}: holds for clips of at least {least} frames, and a held-out one has "
            f"{split.shortest}: give as many --frames"
        )
    short = layout_of(job.model, clip_of_length(footage, least), job.family, job.dtype)
    cheapest_ms = least_ms(table.model, layout, short, job.depth)
    judge = Judge(job.model, job.family, job.source, settings.objective, job.dtype)
    goal: Goal
    if settings.budget is None:
        goal, budget = WithinDeviation(settings.max_deviation or 0.0), None
    else:
        budget = resolve(settings.budget, frames, table.dense_ms, cheapest_ms)
        job.say(f"budget {settings.budget.text}: {budget.text}")
        if not budget.binds:
            timed = _timed(job, judge, None, images, "latency")
            return dense_result(job, split, replace(table, passes=timed), budget)
        goal = WithinBudget(budget.clip_ms)
    problem = Problem(
        sensitivity=sensitivity,
        source=job.source,
        latency=table.model,
        layout=layout,
        short=short,
        length=LengthRule("constant", frames, min(least, frames), max(least, frames)),
        sensitive=(),
        goal=goal,
    )
    decision = _decision(path, problem)
    if decision is None:
        # Only a budget may have no answer: within any deviation there is dense.
        assert settings.budget is not None
        resolve(settings.budget, frames, table.dense_ms, problem.space.least_ms)
        raise AssertionError("the knapsack found no schedule within a budget that has one")
    latencies = _timed(job, judge, decision, images, "latency")
    corrected = corrected_where_missed(job, problem, decision.chosen, latencies)
    again = None if corrected is None else _decision(path, corrected)
    if corrected is not None and again is not None:
        problem, decision = corrected, again
        table = replace(table, model=corrected.latency)
        latencies = _timed(job, judge, decision, images, "latency, corrected")
    trial = decision.chosen.trial
    held_out = dense_runs(job, split.held_out, "held out")
    verified = verify(judge, decision, held_out, latencies, partial(job.progress, "verification"))
    if "knapsack" in latencies:
        measured_ms = latencies["knapsack"].median_ms
        job.say(
            f"predicted {time_text(trial.latency_ms)}, measured {time_text(measured_ms)} "
            f"({measured_ms / trial.latency_ms:.2f})"
        )
    if budget is None:
        budget = as_budget(settings, trial, frames, table, cheapest_ms)
    goal = problem.goal
    allowed_ms = goal.budget_ms if isinstance(goal, WithinBudget) else budget.clip_ms
    evidence = Evidence(job, split, table, budget)
    return Calibration(
        profile=make_profile(evidence, verified, decision, profile.sensitivity),
        budget=budget,
        source=job.source,
        objective=settings.objective,
        latency=table,
        verified=verified,
        sensitivity=problem.sensitivity,
        decision=decision,
        max_deviation=settings.max_deviation,
        kept=kept(profile, measurement, path.name, problem, settings.objective, allowed_ms),
    )


def _decision(path: Path, problem: Problem) -> Decision | None:
    """Return the knapsack's answer as a decision, None if there is none."""
    schedule = problem.knapsack()
    if schedule is None:
        return None
    trial = Trial("knapsack", schedule, problem.predict_ms(schedule), None)
    finalist = Finalist("knapsack", trial, {})
    reason = f"solved by the sensitivities and the latency model of {path.name}"
    return Decision((finalist,), finalist, (reason,))


def _timed(
    job: Job, judge: Judge, decision: Decision | None, images: Tensor, step: str
) -> dict[str, Latency]:
    return time_beside_the_wall(
        judge,
        {} if decision is None else {"knapsack": decision.chosen.trial.schedule},
        images,
        limit_s=job.settings.timing_s,
        progress=partial(job.progress, step),
    )


def _measurement(path: Path, profile: Profile, job: Job, footage: Tensor) -> Measurement:
    """Return the measurement of a profile that was taken as the job runs.

    Args:
        path: The profile's file.
        profile: The profile.
        job: The job.
        footage: Frames as it sees them, ``[S, 3, H, W]``.

    Raises:
        ProfileError: If there is none, or the profile is of other weights or another revision.
    """
    if not profile.measurements or not profile.sensitivity:
        lacking = "measurements" if not profile.measurements else "sensitivities"
        raise ProfileError(
            f"{path}: has no {lacking} to solve from; calibrate without --from measures them"
        )
    layout = layout_of(job.model, footage, job.family, job.dtype)
    grid = (layout.height, layout.width)
    running = precision_of(job.model, footage, job.family, job.dtype)
    _require_same(path, profile, job, grid, running)
    here = (device_name(device_of(job.model)), dtype_name(running), grid)
    fitting = [m for m in profile.measurements if (m.device, m.dtype, m.grid) == here]
    if not fitting:
        raise ProfileError(
            f"{path}: none of its measurements is on {here[0]} in {here[1]} with "
            f"{grid[0]}x{grid[1]} patches at once; calibrate without --from"
        )
    wanted = job.settings.target_frames
    measurement = next((m for m in fitting if m.frames == wanted), fitting[0])
    if measurement.latency_model.form != FORM:
        raise ProfileError(
            f"{path}: its latency model has the form '{measurement.latency_model.form}', expected "
            f"'{FORM}': calibrate without --from"
        )
    return measurement


def _require_same(
    path: Path, profile: Profile, job: Job, grid: tuple[int, int], running: torch.dtype
) -> None:
    """Refuse a profile whose measurements do not hold for a model.

    Raises:
        ProfileError: If it is of other weights, another device, precision, grid or revision.
    """
    record = describe(job.family.name, job.family.attention(job.model), job.family.facts(job.model))
    found = profile.compatibility(
        record,
        name=job.settings.name,
        device=device_of(job.model),
        dtype=running,
        grid=grid,
    )
    reasons = (*found.errors, *found.warnings)
    if reasons:
        raise ProfileError(
            f"{path}: its measurements do not hold here ({'; '.join(reasons)}); calibrate without "
            "--from"
        )


def _table(path: Path, measurement: Measurement, layout: TokenLayout, depth: int) -> LatencyTable:
    try:
        latency = LatencyModel.from_dict(measurement.latency_model.constants)
    except ValueError as error:
        raise ProfileError(f"{path}: {error}") from error
    dense = measurement.dense.latency if measurement.frames == layout.frames else None
    predicted_ms = latency.predict_ms(Schedule.dense(depth), layout)
    # Dense was timed at the end, on a machine faster or slower than the model's.
    timed = [
        (run.latency.median_ms, run.predicted_ms)
        for run in recorded_runs(measurement)
        if run.latency is not None
    ]
    pace = pace_of(timed, (measurement.wall.median_ms, latency.wall_ms(layout)))
    return LatencyTable(
        layout=layout,
        layers=(),
        passes={},
        model=latency,
        report=None,
        dense_ms=predicted_ms if dense is None else dense.median_ms / pace,
        dense_extrapolated=dense is None,
        wall_ms=latency.wall_ms(layout),
        known_error=measurement.latency_model.relative_error,
    )
