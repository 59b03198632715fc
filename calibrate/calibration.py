"""Calibration of a live model: from clips and a budget to a profile.

Dense runs, latency at the target length, sensitivities, knapsack and search, verification, export:
each step takes what the one before it gave.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from spark3r.clips import Clip
from spark3r.errors import Spark3rError, Spark3rWarning
from spark3r.families import Family, detect, unwrap
from spark3r.inference import layout_of
from spark3r.layout import TokenLayout
from spark3r.patching import is_applied
from spark3r.profile import Profile
from spark3r.reduction import clamp
from spark3r.schedule import LayerRule, LengthRule, Schedule

from .baselines import paper_schedules, uniform_schedules
from .budget import ResolvedBudget, parse_budget, resolve
from .damage import choices
from .evaluation import DenseRuns
from .export import Evidence, make_profile
from .latency import LatencyModel
from .latency_timing import LatencyTable, measure_latency
from .objective import Objective, Source
from .profiling import dense_runs, paper_layers, sensitivities
from .quality import mean_figures
from .result import Calibration
from .search import Found, Score, Space, Trial, search
from .settings import (
    KEY_VALUE_FACTORS,
    KNAPSACK_SHARES,
    OPERATORS,
    QUERY_FACTORS,
    Job,
    Progress,
    Say,
    Settings,
)
from .splits import Split, split_clips
from .table_cache import table_key
from .target_length import clip_of_length, measured_target_length
from .verify import Judge, Verified, choose, finalists, verify


def calibrate(
    model: nn.Module,
    clips: Sequence[Clip],
    budget: str,
    *,
    held_out: Sequence[Clip] = (),
    target_frames: int | None = None,
    trials: int = 40,
    objective: Objective = "balanced",
    source: Source | None = None,
    seed: int = 0,
    family: Family | None = None,
) -> Profile:
    """Profile a live model, search a schedule under a budget, verify it and return its profile.

    Args:
        model: An unpatched model in evaluation mode; it is as it was afterwards.
        clips: Clips to calibrate on, on the CPU.
        budget: Such as ``30ms``, ``1.5s/clip``, ``2.5x`` or ``25%``; see `calibrate.budget`.
        held_out: Clips that only the reported figures are measured on; without them some of
            ``clips`` are kept back.
        target_frames: Length that the budget must hold for; None chooses one.
        trials: Trials of the search beyond those it starts from.
        objective: Which metrics count.
        source: What schedules are judged by: ``error``, ``consistency`` or ``deviation``.
        seed: Of everything random.
        family: What is known of the model; None recognises it.

    Raises:
        BudgetError: If the budget cannot be read or (`UnreachableBudgetError`) reached.
        ClipError: If the clips cannot be split, or lack the ground truth that is asked for.
        FamilyError: If the model is of no known family.
        SensitivityError: If the model returns NaN; the message names layer and factor.
    """
    settings = Settings(
        budget=parse_budget(budget),
        target_frames=target_frames,
        trials=trials,
        objective=objective,
        source=source,
        seed=seed,
    )
    return run(model, split_clips(clips, held_out), settings, family=family).profile


def run(
    model: nn.Module,
    split: Split,
    settings: Settings,
    *,
    family: Family | None = None,
    progress: Progress = lambda step, done, total: None,
    say: Say = lambda line: None,
) -> Calibration:
    """Calibrate a model and return all that was measured.

    Args:
        model: An unpatched model in evaluation mode; it is as it was afterwards.
        split: Clips by role.
        settings: What is asked for.
        family: What is known of the model; None recognises it.
        progress: Told of every step.
        say: Told what the user should know, a line at a time.

    Raises:
        Spark3rError: As `calibrate`.
    """
    root = unwrap(model)
    family = detect(root) if family is None else family
    if is_applied(root):
        raise Spark3rError("the model carries a schedule already: remove it before calibrating")
    source = settings.source or _default_source(split)
    job = Job(root, family, settings, source, progress, say)
    with warnings.catch_warnings():
        # Trials apply factors beyond what the short clips allow; the runtime brings them down.
        warnings.simplefilter("ignore", Spark3rWarning)
        return _run(job, split)


def _run(job: Job, split: Split) -> Calibration:
    settings, family = job.settings, job.family
    frames = settings.target_frames
    if frames is None:
        job.progress("target length", 0, 1)
        target = measured_target_length(job, split.search[0].images)
        job.progress("target length", 1, 1)
        job.say(target.text)
        frames = target.frames
    images = clip_of_length(split.search[0].images, frames)
    job.progress("latency", 0, 1)
    table = measure_latency(job.model, images, OPERATORS, family=family, limit_s=settings.timing_s)
    job.progress("latency", 1, 1)
    job.say(str(table.report))
    if table.dense_extrapolated:
        job.say(f"dense does not fit at {frames} frames: its latency is the latency model's word")

    shortest = min(split.clips, key=lambda clip: clip.frames)
    short = layout_of(job.model, shortest.images, family)
    cheapest_ms = least_ms(table.model, table.layout, short, job.depth)
    budget = resolve(settings.budget, frames, table.dense_ms, cheapest_ms)
    job.say(f"budget {settings.budget.text}: {budget.text}")
    evidence = Evidence(
        model=job.model,
        family=family,
        table=table,
        budget=budget,
        split=split,
        seed=settings.seed,
        source=job.source,
        name=settings.name,
        weights=settings.weights,
    )
    if not budget.binds:
        verified: tuple[Verified, ...] = (
            Verified("dense", None, None, table.passes.get("dense"), (), {}),
            Verified("wall", None, None, table.passes["wall"], (), {}),
        )
        profile = make_profile(evidence, verified, None, None)
        return Calibration(profile, budget, job.source, table, verified)

    dense = {
        role: dense_runs(job, clips, role)
        for role, clips in (
            ("search", split.search),
            ("selection", split.selection),
            ("held out", split.held_out),
        )
    }
    sensitivity = sensitivities(job, dense["search"])
    judge = Judge(job.model, family, job.source, settings.objective)
    length = LengthRule(
        "constant", frames, min(split.shortest, frames), max(split.shortest, frames)
    )
    space = Space(
        choices(sensitivity, f"score.{job.source}", OPERATORS, table.model, table.layout),
        OPERATORS,
        length,
        table.model.wall_ms(table.layout),
    )
    sensitive = paper_layers(job, dense["search"], short)
    job.say(f"sensitive layers by the paper's probe: {', '.join(map(str, sensitive)) or 'none'}")
    starts = _starts(space, table, budget, sensitive, min(short.frames, frames))
    found = _search(job, judge, space, starts, table, budget, dense["search"], split)
    if not found.ranked():
        raise Spark3rError(_nothing_ran(found))
    if found.interrupted:
        job.say("interrupted: the best so far is verified and exported, the study is kept")
    decision = choose(
        finalists(found, judge, dense["selection"], lambda d, t: job.progress("selection", d, t))
    )
    verified = verify(
        judge,
        decision,
        dense["held out"],
        images,
        limit_s=2 * settings.timing_s,
        progress=lambda d, t: job.progress("verification", d, t),
    )
    profile = make_profile(evidence, verified, decision, sensitivity)
    chosen = decision.chosen
    measured = next(each for each in verified if each.name == chosen.kind)
    gaps = {
        "search": chosen.trial.score.value if chosen.trial.score else float("nan"),
        "selection": chosen.selection_score,
        "held out": measured.score or 0.0,
    }
    return Calibration(
        profile, budget, job.source, table, verified, sensitivity, found, decision, gaps
    )


def _starts(
    space: Space,
    table: LatencyTable,
    budget: ResolvedBudget,
    sensitive: Sequence[int],
    largest: int,
) -> dict[str, Schedule]:
    """Return the schedules that a search starts from, by name."""

    def predict_ms(schedule: Schedule) -> float:
        return table.model.predict_ms(schedule, table.layout)

    starts = {
        f"knapsack {share:g}": schedule
        for share in KNAPSACK_SHARES
        if (schedule := space.schedule(share * budget.clip_ms, {})) is not None
    }
    depth, limits = len(space.layers), (space.length, largest, predict_ms, budget.clip_ms)
    starts |= paper_schedules(depth, sensitive, *limits)
    return starts | uniform_schedules(depth, OPERATORS, *limits)


def _search(
    job: Job,
    judge: Judge,
    space: Space,
    starts: Mapping[str, Schedule],
    table: LatencyTable,
    budget: ResolvedBudget,
    dense: DenseRuns,
    split: Split,
) -> Found:
    settings = job.settings
    total = len(starts) + settings.trials
    ran = 0

    def objective(schedule: Schedule) -> Score:
        qualities = judge.qualities(schedule, dense)
        scores = judge.scores(qualities, dense)
        return Score(sum(scores.values()) / len(scores), mean_figures(qualities))

    def tell(trial: Trial) -> None:
        nonlocal ran
        ran += 1
        job.progress("search", min(ran, total), total)

    job.progress("search", 0, total)
    found = search(
        space,
        starts,
        objective,
        lambda schedule: table.model.predict_ms(schedule, table.layout),
        budget.clip_ms,
        trials=settings.trials,
        seed=settings.seed,
        storage=settings.storage,
        name=study_name(job, split, budget.frames),
        resume=settings.resume,
        timeout_s=settings.timeout_s,
        on_trial=tell,
    )
    job.progress("search", total, total)
    return found


def least_ms(model: LatencyModel, layout: TokenLayout, short: TokenLayout, depth: int) -> float:
    """Return the least latency of any schedule that sensitivities are measured for.

    Args:
        model: The latency model.
        layout: Token layout at the target length.
        short: Token layout of the shortest calibration clip, which bounds the factors.
        depth: Global layers.
    """
    rules = [
        clamp(LayerRule(query, key_value, each), short)
        for each in OPERATORS
        for query in (1, *QUERY_FACTORS)
        for key_value in (1, *KEY_VALUE_FACTORS)
    ]
    return model.wall_ms(layout) + depth * min(model.layer_ms(rule, layout) for rule in rules)


def study_name(job: Job, split: Split, frames: int) -> str:
    """Return a name that only a search of the same model, clips and settings has."""
    key = table_key(
        job.model,
        split.clips,
        OPERATORS,
        job.family,
        budget=job.settings.budget.text,
        objective=job.settings.objective,
        source=job.source,
        frames=frames,
        seed=job.settings.seed,
    )
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _default_source(split: Split) -> Source:
    return "error" if all(clip.has_ground_truth for clip in split.clips) else "consistency"


def _nothing_ran(found: Found) -> str:
    failures = [trial for trial in found.trials if trial.failure]
    if failures:
        return (
            f"all {len(failures)} trials within the budget failed, the first ('{failures[0].name}')"
            f" with {failures[0].failure}"
        )
    return "the search was stopped before a schedule within the budget had run"
