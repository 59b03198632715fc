"""Calibration of a live model: from clips and a budget to a profile.

Dense runs, latency at the target length, sensitivities, knapsack and search, selection,
verification, export: each step takes what the one before it gave.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from spark3r.clips import Clip
from spark3r.env import device_name
from spark3r.errors import ProfileError, Spark3rError, Spark3rWarning
from spark3r.families.base import Family
from spark3r.identity import describe
from spark3r.layout import TokenLayout
from spark3r.profile import Profile, compare
from spark3r.profile.evidence import BaselineRun, Measurement, ScheduleRun
from spark3r.runner import dtype_name
from spark3r.schedule import LengthRule, Schedule
from spark3r.timing import Latency, Timer

from .budget import ResolvedBudget, parse_budget, resolve, time_text
from .clips import Split, split_clips
from .defaults import TRIALS, Objective, Source
from .dry_run import plan_lines
from .measure.evaluator import DenseRuns, Evaluator
from .measure.latency_model import FORM, LatencyModel
from .measure.sensitivity import dense_runs, paper_layers, sensitivities
from .measure.target_length import TARGET_LENGTHS, clip_of_length, measured_target_length
from .measure.timing import LatencyTable, believed_ms, drift_of, measure_latency, pace_of, unrest_of
from .progress import Reporter, StepTimes
from .report.profile import Evidence, make_profile, sensitivity_records, sensitivity_table
from .report.result import Calibration, as_budget, dense_result
from .report.trade_off import TRADE_OFF_CLIPS, Point, trade_off
from .search.optimizer import Trial, nothing_ran, searched, storage_of, study_name
from .search.problem import Goal, Problem, WithinBudget, WithinDeviation, least_ms
from .search.storage import alone, check_storage
from .settings import OPERATORS, Job, Settings, make_job
from .verify.correction import Means, Settled, corrected_where_missed, settle
from .verify.held_out import time_beside_the_wall, verify
from .verify.selection import Decision, Finalist

UNREST = 0.1
"""Spread of timings above which the user is told."""


def calibrate(
    model: nn.Module,
    clips: Sequence[Clip],
    budget: str,
    *,
    held_out: Sequence[Clip] = (),
    target_frames: int | None = None,
    trials: int = TRIALS,
    objective: Objective = "balanced",
    source: Source | None = None,
    seed: int = 0,
    family: Family | None = None,
    dtype: torch.dtype = torch.float32,
    reporter: Reporter = Reporter(),
    timer: Timer = Timer(),
) -> Profile:
    """Profile a live model, search a schedule under a budget, verify it and return its profile.

    Ctrl-C during the search, or after it, ends it there: the best so far is verified and returned,
    with a `Spark3rWarning`. Before that it is a `KeyboardInterrupt`, like a second one.

    Args:
        model: An unpatched model in evaluation mode; it is as it was afterwards.
        clips: Clips to calibrate on, on the CPU. Half are searched on, a quarter selects what is
            exported, a quarter is held out: sixteen or more let that tell schedules apart.
        budget: Such as ``30ms``, ``1.5s/clip``, ``2.5x`` or ``25%``; see `calibrate.budget`.
        held_out: Clips that only the reported figures are measured on; without them some of
            ``clips`` are kept back.
        target_frames: Length that the budget must hold for; None chooses one.
        trials: Trials of the search beyond those it starts from.
        objective: Which metrics count.
        source: What schedules are judged by: ``error``, ``consistency`` or ``deviation``.
        seed: Of everything random.
        family: What is known of the model; None recognises it.
        dtype: Precision of every pass by autocast, ``float32`` for none: then it is that of the
            parameters, which are never cast here.
        reporter: Receives progress and messages, by default nothing is shown.
        timer: Takes the latencies.

    Raises:
        BudgetError: If the budget cannot be read or (`UnreachableBudgetError`) reached.
        ClipError: If the clips cannot be split, or lack the ground truth that is asked for.
        FamilyError: If the model is of no known family.
        SensitivityError: If the model returns NaN; the message names layer and factor.
        Spark3rError: If the model does not run in this precision, or carries a schedule, or
            autocast is on already.
        ValueError: If the precision is none of ``float32``, ``bfloat16`` and ``float16``.
    """
    settings = Settings(
        budget=parse_budget(budget),
        target_frames=target_frames,
        trials=trials,
        objective=objective,
        source=source,
        seed=seed,
        dtype=dtype,
    )
    split = split_clips(clips, held_out)
    result = run(model, split, settings, family=family, reporter=reporter, timer=timer)
    if result.interrupted:
        warnings.warn(
            "the calibration was interrupted: its profile is the best of what had run",
            Spark3rWarning,
            stacklevel=2,
        )
    return result.profile


def run(
    model: nn.Module,
    split: Split,
    settings: Settings,
    *,
    measured: Path | None = None,
    family: Family | None = None,
    reporter: Reporter = Reporter(),
    timer: Timer = Timer(),
) -> Calibration:
    """Calibrate a model and return all that was measured.

    Args:
        model: An unpatched model in evaluation mode; it is as it was afterwards.
        split: Clips by role.
        settings: What is asked for.
        measured: A profile whose sensitivities and latency model are taken; None measures them.
        family: What is known of the model; None recognises it.
        reporter: Receives progress and messages, by default nothing is shown.
        timer: Takes the latencies.

    Raises:
        ProfileError: If the profile was measured on something else, or lacks what is needed.
        Spark3rError: As `calibrate`.
    """
    times = StepTimes(reporter)
    job = make_job(model, split, settings, family=family, reporter=times, timer=timer)
    with warnings.catch_warnings():
        # Trials apply factors beyond what the short clips allow; the runtime brings them down.
        warnings.simplefilter("ignore", Spark3rWarning)
        if measured is None:
            with alone(settings.storage):
                result = _run(job, split)
        else:
            result = solve_from(measured, job, split)
    return replace(result, seconds=times.seconds, skipped=split.skipped)


def plan(
    model: nn.Module,
    split: Split,
    settings: Settings,
    *,
    family: Family | None = None,
    reporter: Reporter = Reporter(),
    timer: Timer = Timer(),
) -> list[str]:
    """Return what `run` would do, one line per step, with its estimated time.

    The arguments are those of `run`.

    Raises:
        Spark3rError: As `calibrate`.
    """
    job = make_job(model, split, settings, family=family, reporter=reporter, timer=timer)
    return plan_lines(job, split, _target_frames(job, split))


def _run(job: Job, split: Split) -> Calibration:
    settings = job.settings
    frames = _target_frames(job, split)
    images = clip_of_length(split.search[0].images, frames)
    storage, name = storage_of(settings), study_name(job, split, frames)
    check_storage(storage, name, settings.resume)  # now, not after minutes of measuring
    table = measure_latency(
        job.runner,
        images,
        OPERATORS,
        timer=job.timer,
        limit_s=settings.timing_s,
        reporter=job.reporter,
    )
    job.reporter.say(str(table.report))
    unrest = unrest_of(table.passes)
    if unrest > UNREST:
        job.reporter.say(
            f"timings of the same pass differ by {unrest:.0%}: the machine is busy, and what "
            "is measured will hold only roughly"
        )
    if table.dense_extrapolated:
        job.reporter.say(
            f"dense does not fit at {frames} frames: its latency is the latency model's word"
        )
    for line in split.doubts(frames):
        job.reporter.say(line)
    shortest = min(split.clips, key=lambda clip: clip.frames)
    short = job.runner.layout(shortest.images)
    cheapest_ms = least_ms(table.model, table.layout, short, job.depth)
    goal: Goal
    budget: ResolvedBudget | None = None
    if settings.budget is None:
        assert settings.max_deviation is not None
        goal = WithinDeviation(settings.max_deviation)
    else:
        budget = resolve(settings.budget, frames, table.dense_ms, cheapest_ms)
        job.reporter.say(f"budget {settings.budget.text}: {budget.text}")
        if not budget.binds:
            return dense_result(job, split, table, budget)
        goal = WithinBudget(budget.clip_ms)

    dense = {
        role: dense_runs(job, clips, role)
        for role, clips in (
            ("search", split.search),
            ("selection", split.selection),
            ("held out", split.held_out),
        )
    }
    sensitivity = sensitivities(job, dense["search"])
    sensitive = paper_layers(job, dense["search"], short)
    job.reporter.say(
        f"sensitive layers by the paper's probe: {', '.join(map(str, sensitive)) or 'none'}"
    )
    problem = Problem(
        sensitivity=sensitivity,
        source=job.source,
        latency=table.model,
        layout=table.layout,
        short=short,
        length=LengthRule(
            "constant", frames, min(split.shortest, frames), max(split.shortest, frames)
        ),
        sensitive=sensitive,
        goal=goal,
    )
    evaluator = Evaluator(job.runner, job.source, settings.objective)
    problem = _right_at_the_goal(job, problem, table, images)
    if settings.budget is not None:  # the least that can be reached may be more than was said
        budget = resolve(settings.budget, frames, table.dense_ms, problem.space.least_ms)
    search_with = partial(searched, job, evaluator, dense["search"], storage, name)
    found = search_with(problem, trials=settings.trials)
    if not found.ranked():
        if found.interrupted:
            raise KeyboardInterrupt
        raise Spark3rError(nothing_ran(found, problem))
    if found.interrupted:
        job.reporter.say("interrupted: the best so far is verified and exported, the study is kept")
    settled = settle(Means(job, evaluator, dense, images, search_with), problem, found)
    if budget is None:
        budget = as_budget(settings, settled.decision.chosen.trial, frames, table, cheapest_ms)
    return _result(job, split, table, budget, settled, evaluator, dense)


def _target_frames(job: Job, split: Split) -> int:
    if job.settings.target_frames is not None:
        return job.settings.target_frames
    if job.settings.budget is None:
        return TARGET_LENGTHS[0]
    target = measured_target_length(job, split.search[0].images)
    job.reporter.say(target.text)
    return target.frames


def _right_at_the_goal(job: Job, problem: Problem, table: LatencyTable, images: Tensor) -> Problem:
    """Return the problem, its latency model corrected by the knapsack's answer as it is timed.

    A model fitted from the wall to dense may be some percent off in between, and every schedule of
    the search lies where the knapsack's answer does. If the machine has become slower or faster
    since, that is taken out, as the budget was resolved before: dense and the wall together show
    it, or the wall alone where dense does not fit. (The wall alone is short, and a disturbed one
    would shift everything.) The less they agree on that, the less the timing is believed, as a few
    timings of one minute cannot tell how another differs.
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


def _result(
    job: Job,
    split: Split,
    table: LatencyTable,
    budget: ResolvedBudget,
    settled: Settled,
    evaluator: Evaluator,
    dense: dict[str, DenseRuns],
) -> Calibration:
    chosen = settled.decision.chosen
    points: tuple[Point, ...] = ()
    few = dense["selection"].first(TRADE_OFF_CLIPS)
    was_stopped = settled.interrupted
    if not was_stopped:
        try:
            points = trade_off(
                settled.found,
                chosen.trial,
                evaluator,
                few,
                job.reporter.step("trade-off"),
            )
        except KeyboardInterrupt:
            job.reporter.say("interrupted: exported without other schedules of the trade-off")
            was_stopped = True
    measured = next(each for each in settled.verification.schedules if each.name == chosen.kind)
    gaps = {
        "search": chosen.trial.score.mean if chosen.trial.score else None,
        "selection": chosen.selection_score,
        "held out": measured.score,
    }
    table = replace(table, model=settled.problem.latency)
    evidence = Evidence(job, split, table, budget)
    records = sensitivity_records(settled.problem.sensitivity, split, job.settings.objective)
    return Calibration(
        profile=make_profile(
            evidence,
            settled.verification,
            settled.decision,
            records,
            points,
            few.qualities if points else (),
        ),
        budget=budget,
        source=job.source,
        objective=job.settings.objective,
        latency=table,
        verification=settled.verification,
        sensitivity=settled.problem.sensitivity,
        found=settled.found,
        decision=settled.decision,
        gaps={role: value for role, value in gaps.items() if value is not None},
        was_stopped=was_stopped,
        searched_clips=len(split.search),
        sensitive=tuple(settled.problem.sensitive),
        max_deviation=job.settings.max_deviation,
    )


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
    layout = job.runner.layout(images)
    table = _table(path, measurement, layout, job.depth)
    least = profile.schedule().length.min_frames
    if split.shortest < least:
        raise ProfileError(
            f"{path}: holds for clips of at least {least} frames, and a held-out one has "
            f"{split.shortest}: give as many --frames"
        )
    short = job.runner.layout(clip_of_length(footage, least))
    cheapest_ms = least_ms(table.model, layout, short, job.depth)
    evaluator = Evaluator(job.runner, job.source, settings.objective)
    goal: Goal
    if settings.budget is None:
        goal, budget = WithinDeviation(settings.max_deviation or 0.0), None
    else:
        budget = resolve(settings.budget, frames, table.dense_ms, cheapest_ms)
        job.reporter.say(f"budget {settings.budget.text}: {budget.text}")
        if not budget.binds:
            timed = time_beside_the_wall(job, {}, images, "latency")
            dense = dense_result(job, split, replace(table, passes=timed), budget)
            return replace(dense, origin=path)
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
    latencies = _timed(job, decision, images, "latency")
    corrected = corrected_where_missed(job, problem, decision.chosen, latencies)
    again = None if corrected is None else _decision(path, corrected)
    if corrected is not None and again is not None:
        problem, decision = corrected, again
        table = replace(table, model=corrected.latency)
        latencies = _timed(job, decision, images, "latency, corrected")
    trial = decision.chosen.trial
    held_out = dense_runs(job, split.held_out, "held out")
    verification = verify(
        evaluator, decision, held_out, latencies, job.reporter.step("verification")
    )
    if "knapsack" in latencies:
        measured_ms = latencies["knapsack"].median_ms
        job.reporter.say(
            f"predicted {time_text(trial.latency_ms)}, measured {time_text(measured_ms)} "
            f"({measured_ms / trial.latency_ms:.2f})"
        )
    if budget is None:
        budget = as_budget(settings, trial, frames, table, cheapest_ms)
    evidence = Evidence(job, split, table, budget)
    return Calibration(
        profile=make_profile(evidence, verification, decision, profile.sensitivity),
        budget=budget,
        source=job.source,
        objective=settings.objective,
        latency=table,
        verification=verification,
        sensitivity=problem.sensitivity,
        decision=decision,
        max_deviation=settings.max_deviation,
        origin=path,
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


def _timed(job: Job, decision: Decision, images: Tensor, step: str) -> dict[str, Latency]:
    return time_beside_the_wall(job, {"knapsack": decision.chosen.trial.schedule}, images, step)


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
    layout = job.runner.layout(footage)
    grid = (layout.height, layout.width)
    running = job.runner.precision(footage)
    _require_same(path, profile, job, grid, running)
    here = (device_name(job.runner.device), dtype_name(running), grid)
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
    family = job.runner.family
    record = describe(family.name, job.runner.attention, family.metadata(job.runner.root))
    found = compare(
        profile,
        record,
        name=job.settings.name,
        device=job.runner.device,
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
    runs: tuple[ScheduleRun | BaselineRun, ...]
    runs = (*measurement.schedules, *measurement.baselines)
    timed = [
        (each.latency.median_ms, each.predicted_ms) for each in runs if each.latency is not None
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
