"""Calibration of a live model, from clips and a budget to a profile, step by step.

Measure, search, verify, report: each step takes the results of the one before it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from spark3r.clips import Clip
from spark3r.errors import Spark3rWarning
from spark3r.families.base import Family
from spark3r.profile import Profile, profile_path
from spark3r.schedule import LengthRule
from spark3r.timing import Timer

from .budget import Budget, ResolvedBudget, parse_budget, resolve
from .clips import Split, split_clips
from .defaults import EFFORTS, LEAST_SAMPLES, TARGET_LENGTHS, TIMER, Effort, Objective, Source
from .measure.earlier_profile import load_measurements
from .measure.evaluator import DenseRuns, Evaluator
from .measure.measurements import (
    Latencies,
    Sensitivities,
    at_binding_length,
    measure_latencies,
    measure_sensitivities,
)
from .measure.passes import run_dense_by_role, run_dense_of
from .measure.passes import serve as serve_passes
from .measure.target_length import choose_target, longest_short
from .plan import ClipCounts, Plan, Work, duration_text, plan_within
from .progress import CallbackReporter, Reporter, StepTimes
from .ranks import ONE_PROCESS, AloneTimer, Ranks, threads_of_one_process
from .report.result import Calibration, make_result
from .report.summary import missed
from .report.trade_off import run_trade_off
from .search.joining import Joined
from .search.optimizer import Optimize
from .search.problem import DeviationLimit, LatencyLimit, SearchProblem, least_latency_ms
from .search.run import join_search, require_result, run_search, search_options, solve
from .search.storage import lock_storage
from .settings import Job, Settings, make_job
from .verify.correction import (
    CorrectionContext,
    TargetTimes,
    correct_at_goal,
    select_and_correct,
)


def calibrate(
    model: nn.Module,
    clips: Sequence[Clip],
    budget: str | None = None,
    *,
    max_deviation: float | None = None,
    held_out: Sequence[Clip] = (),
    target_frames: int | None = None,
    from_profile: str | Path | None = None,
    objective: Objective = "balanced",
    source: Source | None = None,
    effort: Effort = "normal",
    trials: int | None = None,
    time_limit_s: float | None = None,
    storage: str | Path | None = None,
    resume: bool = False,
    cache: str | Path | None = None,
    seed: int = 0,
    family: Family | None = None,
    dtype: torch.dtype = torch.float32,
    reporter: Reporter | Callable[[str, int, int], object] = Reporter(),
    timer: Timer = TIMER,
) -> Profile:
    """Calibrate a live model and return its profile.

    The model is profiled, a schedule is searched under a budget or within a deviation, and verified
    on held-out clips. `run` does the same and returns everything that was measured.

    Ctrl-C during the search, or after it, ends it there: the best schedule so far is verified and
    returned, with a `Spark3rWarning`. Before that, and the second time, it is a
    `KeyboardInterrupt`. A schedule that misses the budget or the deviation is returned with a
    `Spark3rWarning` as well.

    Args:
        model: An unpatched model. It is unchanged afterwards.
        clips: Clips to calibrate on, on the CPU. Half are searched on, a quarter decides which
            schedule is exported, a quarter is held out. Sixteen or more can tell schedules apart.
        budget: Largest latency, such as ``30ms``, ``1.5s/clip``, ``2.5x`` or ``25%``; see
            `calibrate.budget`.
        max_deviation: Largest mean deviation from the dense model instead of a budget, such as 0.01
            for 1 %; see `calibrate.measure.score`. The least latency is sought.
        held_out: Clips that only the reported figures are measured on. Without them a quarter of
            ``clips`` is held out.
        target_frames: Length in frames that the budget must hold for; None chooses one.
        from_profile: Path or name of a measured profile of this model and device, whose
            sensitivities and latency model are taken instead of measuring and searching.
        objective: Metrics that count.
        source: What schedules are judged by: ``error``, ``consistency`` or ``deviation``. None
            takes error if all clips have ground truth, and deviation otherwise.
        effort: How much work to do: ``quick`` searches nothing, ``normal`` and ``thorough`` try 8
            and 40 schedules, and ``thorough`` also times longer.
        trials: Trials of the search beyond those of the initial schedules; None takes those of
            ``effort``.
        time_limit_s: Seconds that the whole calibration is planned to take, with fewer trials and
            clips if needed; None for no limit.
        storage: Path of a journal file, or an Optuna URL, that stores the trials; None stores none.
        resume: Whether to continue the search that ``storage`` holds.
        cache: Folder that stores measured sensitivities; None stores none.
        seed: Seed of the search.
        family: The model's family; None recognises it.
        dtype: Autocast precision of every pass: ``bfloat16`` or ``float16``; ``float32`` runs
            without autocast, in the precision of the parameters.
        reporter: Receives progress and messages. By default nothing is shown;
            `calibrate.progress.TerminalReporter` shows them like the command. A function of step,
            done and total receives the progress alone.
        timer: Takes the latencies.

    Raises:
        BudgetError: If the budget cannot be read or (`UnreachableBudgetError`) reached.
        ClipError: If the clips cannot be split, or lack the ground truth that ``source`` needs.
        FamilyError: If the model is of no known family and none is given.
        ProfileError: If ``from_profile`` was measured on something else, or lacks what is needed.
        SensitivityError: If the model returns NaN; the message names layer and factor.
        Spark3rError: If the model does not run in this precision, or carries a schedule, or
            autocast is on already.
        StudyError: If the storage cannot be used.
        ValueError: If not exactly one of ``budget`` and ``max_deviation`` is given, or arguments
            contradict each other.
    """
    settings = Settings(
        budget=None if budget is None else parse_budget(budget),
        max_deviation=max_deviation,
        target_frames=target_frames,
        objective=objective,
        source=source,
        trials=EFFORTS[effort].trials if trials is None else trials,
        timing_s=EFFORTS[effort].timing_s,
        time_limit_s=time_limit_s,
        storage=storage,
        resume=resume,
        cache=None if cache is None else Path(cache),
        seed=seed,
        dtype=dtype,
    )
    result = run(
        model,
        split_clips(clips, held_out),
        settings,
        from_profile=None if from_profile is None else profile_path(from_profile),
        family=family,
        reporter=reporter if isinstance(reporter, Reporter) else CallbackReporter(reporter),
        timer=timer,
    )
    if result.interrupted:
        warnings.warn(
            "the calibration was interrupted: its profile holds the best schedule so far",
            Spark3rWarning,
            stacklevel=2,
        )
    elif (why := missed(result)) is not None:
        warnings.warn(f"the goal is missed: {why}", Spark3rWarning, stacklevel=2)
    return result.profile


def run(
    model: nn.Module,
    split: Split,
    settings: Settings,
    *,
    from_profile: Path | None = None,
    family: Family | None = None,
    reporter: Reporter = Reporter(),
    timer: Timer = TIMER,
    ranks: Ranks = ONE_PROCESS,
) -> Calibration:
    """Calibrate a model like `calibrate`, and return everything that was measured.

    Args:
        model: An unpatched model. It is unchanged afterwards.
        split: Clips by role.
        settings: The request.
        from_profile: File of a profile whose measurements are taken; None measures.
        family: The model's family; None recognises it.
        reporter: Receives progress and messages. By default nothing is shown. The time limit
            counts from the creation of a `StepTimes`, otherwise from this call.
        timer: Takes the latencies.
        ranks: Processes that share the passes over clips; this is rank 0 of them.

    Raises:
        Spark3rError: As `calibrate`.
    """
    times = reporter if isinstance(reporter, StepTimes) else StepTimes(reporter)
    job = make_job(
        model,
        split,
        settings,
        family=family,
        reporter=times,
        timer=timer,
        elapsed_s=times.elapsed_s,
    )
    if ranks.size > 1:
        job = _shared(job, ranks)
    with warnings.catch_warnings():
        # Trials apply factors beyond what the short clips allow; the runtime brings them down.
        warnings.simplefilter("ignore", Spark3rWarning)
        # Where nothing is searched, no storage is needed.
        with lock_storage(settings.storage if settings.trials and not from_profile else None):
            if from_profile is None:
                origin = measured_now(job, split)
            else:
                origin = of_profile(from_profile, job, split)
            result = _run(job, origin, times.seconds)
    return replace(result, seconds=times.seconds, elapsed_s=times.elapsed_s())


def _shared(job: Job, ranks: Ranks) -> Job:
    """Return a job of several ranks, whose latencies are taken as in one process."""
    threads = threads_of_one_process() if job.runner.device.type == "cpu" else None
    if threads is None:
        return replace(job, ranks=ranks)
    job.reporter.say(
        f"{ranks.size} ranks; latencies are taken in one of them, on {threads} threads"
    )
    timer = AloneTimer(timer=job.timer, threads=threads)
    return replace(job, ranks=ranks, timer=timer, threads=threads)


def serve(
    model: nn.Module,
    split: Split,
    settings: Settings,
    ranks: Ranks,
    *,
    family: Family | None = None,
) -> None:
    """Run the passes that rank 0 of a calibration asks for, until it has ended.

    The arguments are those of `run` there.

    Raises:
        RankError: If rank 0 ended before the calibration did.
    """
    job = replace(make_job(model, split, settings, family=family), ranks=ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Spark3rWarning)  # as in `run`
        serve_passes(job, split)


def join(
    model: nn.Module,
    split: Split,
    settings: Settings,
    *,
    family: Family | None = None,
    reporter: Reporter = Reporter(),
    ranks: Ranks = ONE_PROCESS,
) -> Joined:
    """Run trials of a calibration that another process began, until its search has ended.

    Args:
        model: The same model as there, unpatched. It is unchanged afterwards.
        split: The same clips by role as there.
        settings: The same request as there. `Settings.storage` is a database server.
        family: The model's family; None recognises it.
        reporter: Receives progress and messages. By default nothing is shown.
        ranks: Processes that share the passes over clips; this is rank 0 of them.

    Returns:
        How many trials ran here. Nothing is exported.

    Raises:
        Spark3rError: As `calibrate`.
    """
    job = make_job(model, split, settings, family=family, reporter=reporter)
    job = replace(job, ranks=ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Spark3rWarning)  # as in `run`
        dense = run_dense_of(job, split, "search")
        evaluator = Evaluator(job.runner, job.source, settings.objective)
        return join_search(job, split, evaluator, dense)


@dataclass(frozen=True)
class Origin:
    """Where measurements and answers come from: this calibration, or an earlier profile.

    Attributes:
        split: Clips by role, as far as they run.
        latencies: Latencies at the target length.
        sensitivities: Function from the dense runs of the search clips to the sensitivities.
        optimize: Function from an evaluator, these runs and a plan to the function that solves a
            problem.
        answer_samples: Samples that are taken of the knapsack's answer before that.
        path: The earlier profile.
    """

    split: Split
    latencies: Latencies
    sensitivities: Callable[[DenseRuns], Sensitivities]
    optimize: Callable[[Evaluator, DenseRuns, Plan], Optimize]
    answer_samples: int = 1
    path: Path | None = None


def measured_now(job: Job, split: Split) -> Origin:
    """Return the measurements of this calibration.

    Schedules are searched on clips, unless there are to be no trials.
    """
    footage, wanted = split.search[0].images, job.settings.target_frames
    if wanted is not None:
        search_options(job, split, wanted)  # refuses a storage before anything is timed
    short = longest_short(job, footage, wanted or TARGET_LENGTHS[-1])
    frames = wanted or choose_target(job, short)
    options = search_options(job, split, frames)
    latencies = measure_latencies(job, split, frames, short)
    if wanted is None:
        latencies = at_binding_length(job, split, latencies)
        if latencies.frames != frames:
            options = search_options(job, split, latencies.frames)

    def optimize(evaluator: Evaluator, dense: DenseRuns, plan: Plan) -> Optimize:
        if not plan.work.trials:
            return solve
        timeout_s = None
        if job.settings.time_limit_s is not None:
            timeout_s = job.settings.time_limit_s - job.elapsed_s() - plan.after_search_s
        now = replace(options, trials=plan.work.trials, timeout_s=timeout_s)
        return partial(run_search, job, evaluator, dense, now)

    return Origin(
        split,
        latencies,
        lambda dense: measure_sensitivities(job, split, dense, latencies.short),
        optimize,
        answer_samples=1 if job.settings.trials else LEAST_SAMPLES,
    )


def of_profile(path: Path, job: Job, split: Split) -> Origin:
    """Return the measurements of an earlier profile, which the knapsack's answer solves.

    Nothing is searched, and only held-out clips run.
    """
    latencies, sensitivities = load_measurements(path, job, split)
    return Origin(
        replace(split, search=(), validation=()),
        latencies,
        lambda dense: sensitivities,
        lambda evaluator, dense, plan: solve,
        answer_samples=LEAST_SAMPLES,
        path=path,
    )


def _run(job: Job, origin: Origin, seconds: Mapping[str, float]) -> Calibration:
    """Search, verify and report. The seconds are those of the steps, and grow meanwhile."""
    settings, latencies = job.settings, origin.latencies
    table = latencies.table
    least_ms = least_latency_ms(table.model, table.layout, latencies.short, job.depth)
    budget = resolved_budget(job, latencies, least_ms)
    if budget is not None and not budget.binds:
        return make_result(job, origin.split, latencies, budget, origin.path)

    evaluator = Evaluator(job.runner, job.source, settings.objective)
    searched = run_dense_of(job, origin.split, "search")
    # The check of the first pass is not part of the step, and comes once.
    plan = planned(job, origin, budget, seconds.get("dense, search", 0.0))
    split = trimmed(origin.split, plan.work)
    dense = run_dense_by_role(job, split, searched)
    sensitivities = origin.sensitivities(dense.search)
    times = TargetTimes(job, latencies)
    problem = make_problem(job, latencies, sensitivities, budget)
    problem = correct_at_goal(problem, times, origin.answer_samples)
    if settings.budget is not None:  # fewer factors may be measured than `least_ms` assumes
        budget = resolve(settings.budget, latencies.frames, table.dense_ms, problem.space.least_ms)
    optimize = origin.optimize(evaluator, dense.search, plan)
    found = optimize(problem, None)
    require_result(found)
    if found.interrupted:
        job.reporter.say("interrupted: the best schedule so far is verified and exported")

    context = CorrectionContext(job, evaluator, dense, times, optimize, origin.path)
    outcome = select_and_correct(context, problem, found)

    if budget is None:  # the latency that was found within the deviation counts as the budget
        found_ms = outcome.decision.chosen.trial.latency_ms
        text = Budget(settings.goal_text, "clip", found_ms)
        budget = ResolvedBudget(text, latencies.frames, found_ms, table.dense_ms, least_ms)
    trade_off = run_trade_off(job, evaluator, dense.validation, outcome)
    return make_result(
        job, split, latencies, budget, origin.path, sensitivities, outcome, trade_off
    )


def planned(job: Job, origin: Origin, budget: ResolvedBudget | None, dense_s: float) -> Plan:
    """Return the plan of what follows the dense runs of the search clips, and tell the user.

    Args:
        job: The job.
        origin: The measurements.
        budget: The budget at the target length; None where a deviation is the limit.
        dense_s: Seconds that the dense runs of the search clips took.
    """
    split, settings, table = origin.split, job.settings, origin.latencies.table
    counts = ClipCounts(len(split.search), len(split.validation), len(split.held_out))
    work = Work(counts, settings.trials, job.depth, within_deviation=budget is None)
    if origin.path is not None:
        return Plan(work, 0.0, 0.0)
    answer_ms = table.dense_ms / 2 if budget is None else budget.clip_ms
    pace = origin.latencies.pace
    timing_s = (3 * answer_ms + 5 * (pace.wall_ms + (pace.dense_ms or 0.0))) / 1000
    timing_s *= (
        table.wall.busy
    )  # CPU time is taken on a busy machine, and the limit is of the clock
    run_s = dense_s / len(split.search)
    limit_s = settings.time_limit_s
    plan = plan_within(work, run_s, timing_s, job.elapsed_s() - dense_s, limit_s)
    line = f"plan: {plan.work.text}; about {duration_text(plan.total_s)} in all"
    if limit_s is not None:
        line += f", of {duration_text(limit_s)} that are allowed"
        if plan.total_s > limit_s:
            line += ": there is no smaller plan"
    job.reporter.say(line)
    return plan


def trimmed(split: Split, work: Work) -> Split:
    """Return the first clips of each role, as many as a plan has."""
    validation = split.validation[: work.clips.validation] if work.trials else ()
    return replace(split, validation=validation, held_out=split.held_out[: work.clips.held_out])


def resolved_budget(job: Job, latencies: Latencies, least_ms: float) -> ResolvedBudget | None:
    """Return the job's budget at the target length, None if a deviation is the limit.

    Raises:
        UnreachableBudgetError: If the budget is less than ``least_ms``, the least latency per clip.
    """
    budget = job.settings.budget
    if budget is None:
        return None
    resolved = resolve(budget, latencies.frames, latencies.table.dense_ms, least_ms)
    line = f"budget {budget.text}: {resolved.text}"
    if budget.kind in ("frame", "clip"):
        line += f", at the pace at which {latencies.pace.text}"
    job.reporter.say(line)
    return resolved


def make_problem(
    job: Job, latencies: Latencies, sensitivities: Sensitivities, budget: ResolvedBudget | None
) -> SearchProblem:
    """Return the problem of finding a schedule within a budget, or within the job's deviation."""
    shortest, frames = latencies.short.frames, latencies.frames
    return SearchProblem(
        sensitivity=sensitivities.table,
        latency=latencies.table.model,
        layout=latencies.table.layout,
        short=latencies.short,
        length=LengthRule("constant", frames, min(shortest, frames), max(shortest, frames)),
        sensitive=sensitivities.sensitive,
        goal=DeviationLimit(job.settings.max_deviation or 0.0)
        if budget is None
        else LatencyLimit(budget.clip_ms),
    )
