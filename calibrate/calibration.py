"""Calibration of a live model: from clips and a budget to a profile.

Dense runs, latency at the target length, sensitivities, knapsack and search, verification, export:
each step takes what the one before it gave.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from torch import Tensor, nn

from spark3r.clips import Clip
from spark3r.errors import Spark3rError, Spark3rWarning
from spark3r.families import Family, detect, unwrap
from spark3r.inference import layout_of
from spark3r.layout import TokenLayout
from spark3r.patching import is_applied
from spark3r.profile import Profile
from spark3r.reduction import clamp
from spark3r.schedule import LayerRule, LengthRule, Operators, Schedule

from .baselines import paper_schedules, uniform_schedules
from .budget import Budget, ResolvedBudget, parse_budget, resolve
from .damage import choices, sensitive_layers
from .evaluation import DenseRuns, run_dense
from .export import Evidence, make_profile
from .latency import LatencyModel
from .latency_timing import LatencyTable, measure_latency, time_passes
from .objective import Objective, Source
from .quality import mean_figures
from .search import Found, Score, Space, Trial, search
from .sensitivity import SensitivityError, probe
from .splits import Split, split_clips
from .table_cache import cached_table, table_key
from .target_length import TargetLength, choose_target_length
from .verify import Decision, Judge, Verified, choose, finalists, verify

OPERATORS = (
    Operators(),
    Operators(key_value="token_stride", keep_special=True, keep_anchor=True, mass_correction=1.0),
)
"""What layers choose from: the paper's operators, and the ones most faithful to dense."""

QUERY_FACTORS = (2, 4)
KEY_VALUE_FACTORS = (2, 4, 8, 16, 32)
"""Factors that sensitivities are measured at; 1 comes with them."""

KNAPSACK_SHARES = (0.8, 1.25)
"""Other budgets, as shares of the one asked for, that the knapsack is also solved at."""

PROBED_CLIPS = 4
"""Clips of the search that sensitivities are measured on."""

PAPER_POINT, PAPER_RAISE = 32, 8
"""The paper's probe: all layers at 32, one raised to 8 times that. Brought down to short clips."""

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done, and its total."""


@dataclass(frozen=True)
class Settings:
    """What a calibration is asked for.

    Attributes:
        budget: How long a clip may take.
        target_frames: Length that the budget must hold for; None chooses one.
        trials: Trials of the search beyond those it starts from.
        timeout_s: Propose no further trial after so many seconds of search.
        objective: Which metrics count.
        source: What schedules are judged by; None takes error where all clips have ground truth,
            and consistency otherwise.
        seed: Of everything random.
        storage: Where trials are kept; see `calibrate.study.open_studies`.
        resume: Whether to go on with an earlier search of the same model, clips and settings.
        cache: Folder of measured sensitivities; None keeps none.
        timing_s: About how many seconds each timing may take.
        name: What people call the model.
        weights: Where its weights are found.
    """

    budget: Budget
    target_frames: int | None = None
    trials: int = 40
    timeout_s: float | None = None
    objective: Objective = "balanced"
    source: Source | None = None
    seed: int = 0
    storage: str | Path | None = None
    resume: bool = False
    cache: Path | None = None
    timing_s: float = 15.0
    name: str | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Calibration:
    """A profile and everything it was made of.

    Attributes:
        profile: The profile.
        budget: The budget on this device.
        source: What schedules were judged by.
        latency: What was timed before the search.
        verified: What was measured at the end, dense and the wall first.
        sensitivity: The sensitivities, None where dense met the budget.
        found: The search, likewise.
        decision: Which schedule is exported, likewise.
        gaps: Mean score of the chosen schedule on search, selection and held-out clips.
    """

    profile: Profile
    budget: ResolvedBudget
    source: Source
    latency: LatencyTable
    verified: tuple[Verified, ...]
    sensitivity: pd.DataFrame | None = None
    found: Found | None = None
    decision: Decision | None = None
    gaps: dict[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> Verified:
        """What the exported schedule measured; dense where it met the budget."""
        kind = "dense" if self.decision is None else self.decision.chosen.kind
        return next(each for each in self.verified if each.name == kind)

    @property
    def interrupted(self) -> bool:
        """Whether the search was stopped by Ctrl-C."""
        return self.found is not None and self.found.interrupted


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
    say: Callable[[str], None] = lambda line: None,
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
    with warnings.catch_warnings():
        # Trials apply factors beyond what the short clips allow; the runtime brings them down.
        warnings.simplefilter("ignore", Spark3rWarning)
        return _run(root, split, settings, family, source, progress, say)


def _run(
    model: nn.Module,
    split: Split,
    settings: Settings,
    family: Family,
    source: Source,
    progress: Progress,
    say: Callable[[str], None],
) -> Calibration:
    depth = len(family.attention(model))
    frames = settings.target_frames
    if frames is None:
        progress("target length", 0, 1)
        target = _target_length(model, split, settings, family)
        progress("target length", 1, 1)
        say(target.text)
        frames = target.frames
    images = clip_of_length(split.search[0].images, frames)
    progress("latency", 0, 1)
    table = measure_latency(model, images, OPERATORS, family=family, limit_s=settings.timing_s)
    progress("latency", 1, 1)
    say(str(table.report))
    if table.dense_extrapolated:
        say(f"dense does not fit at {frames} frames: its latency is the latency model's word")

    short = layout_of(model, min(_all(split), key=lambda clip: clip.frames).images, family)
    cheapest_ms = least_ms(table.model, table.layout, short, depth)
    budget = resolve(settings.budget, frames, table.dense_ms, cheapest_ms)
    say(f"budget {settings.budget.text}: {budget.text}")
    evidence = Evidence(
        model=model,
        family=family,
        table=table,
        budget=budget,
        split=split,
        seed=settings.seed,
        source=source,
        name=settings.name,
        weights=settings.weights,
    )
    if not budget.binds:
        verified: tuple[Verified, ...] = (
            Verified("dense", None, None, table.passes.get("dense"), (), {}),
            Verified("wall", None, None, table.passes["wall"], (), {}),
        )
        profile = make_profile(evidence, verified, None, None)
        return Calibration(profile, budget, source, table, verified)

    dense = {
        role: _dense_runs(model, clips, family, f"dense, {role}", progress)
        for role, clips in (
            ("search", split.search),
            ("selection", split.selection),
            ("held out", split.held_out),
        )
    }
    sensitivity = _sensitivities(model, dense["search"], settings, family, progress)
    judge = Judge(model, family, source, settings.objective)
    length = LengthRule(
        "constant", frames, min(split.shortest, frames), max(split.shortest, frames)
    )
    space = Space(
        choices(sensitivity, f"score.{source}", OPERATORS, table.model, table.layout),
        OPERATORS,
        length,
        table.model.wall_ms(table.layout),
    )

    def predict_ms(schedule: Schedule) -> float:
        return table.model.predict_ms(schedule, table.layout)

    sensitive = _paper_layers(model, dense["search"], settings, family, short, source, progress)
    say(f"sensitive layers by the paper's probe: {', '.join(map(str, sensitive)) or 'none'}")
    largest = min(short.frames, frames)
    starts = {
        f"knapsack {share:g}": schedule
        for share in KNAPSACK_SHARES
        if (schedule := space.schedule(share * budget.clip_ms, {})) is not None
    }
    limits = (length, largest, predict_ms, budget.clip_ms)
    starts |= paper_schedules(depth, sensitive, *limits)
    starts |= uniform_schedules(depth, OPERATORS, *limits)

    total = len(starts) + settings.trials
    ran = 0

    def objective(schedule: Schedule) -> Score:
        qualities = judge.qualities(schedule, dense["search"])
        scores = judge.scores(qualities, dense["search"])
        return Score(sum(scores.values()) / len(scores), mean_figures(qualities))

    def tell(trial: Trial) -> None:
        nonlocal ran
        ran += 1
        progress("search", min(ran, total), total)

    progress("search", 0, total)
    found = search(
        space,
        starts,
        objective,
        predict_ms,
        budget.clip_ms,
        trials=settings.trials,
        seed=settings.seed,
        storage=settings.storage,
        name=study_name(model, split, settings, source, frames, family),
        resume=settings.resume,
        timeout_s=settings.timeout_s,
        on_trial=tell,
    )
    progress("search", total, total)
    if not found.ranked():
        raise Spark3rError(_nothing_ran(found))
    if found.interrupted:
        say("interrupted: the best so far is verified and exported, the study is kept")
    decision = choose(
        finalists(found, judge, dense["selection"], lambda d, t: progress("selection", d, t))
    )
    verified = verify(
        judge,
        decision,
        dense["held out"],
        images,
        limit_s=2 * settings.timing_s,
        progress=lambda d, t: progress("verification", d, t),
    )
    profile = make_profile(evidence, verified, decision, sensitivity)
    chosen = decision.chosen
    measured = next(each for each in verified if each.name == chosen.kind)
    gaps = {
        "search": chosen.trial.score.value if chosen.trial.score else float("nan"),
        "selection": chosen.selection_score,
        "held out": measured.score or 0.0,
    }
    return Calibration(profile, budget, source, table, verified, sensitivity, found, decision, gaps)


def clip_of_length(images: Tensor, frames: int) -> Tensor:
    """Return ``frames`` frames ``[S, 3, H, W]`` to time, going to and fro over the footage."""
    count = images.shape[0]
    period = max(1, 2 * count - 2)
    order = [i % period if i % period < count else period - i % period for i in range(frames)]
    return images[order]


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


def study_name(
    model: nn.Module,
    split: Split,
    settings: Settings,
    source: Source,
    frames: int,
    family: Family,
) -> str:
    """Return a name that only a search of the same model, clips and settings has."""
    key = table_key(
        model,
        _all(split),
        OPERATORS,
        family,
        budget=settings.budget.text,
        objective=settings.objective,
        source=source,
        frames=frames,
        seed=settings.seed,
    )
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _target_length(
    model: nn.Module, split: Split, settings: Settings, family: Family
) -> TargetLength:
    def latencies(frames: int) -> tuple[float, float]:
        images = clip_of_length(split.search[0].images, frames)
        timed = time_passes(
            model,
            images,
            {"dense": "dense", "wall": "wall"},
            family=family,
            limit_s=settings.timing_s / 4,
        )
        if "wall" not in timed:
            raise Spark3rError(
                f"a clip of {frames} frames does not fit even without global attention: give a "
                "shorter --target-frames"
            )
        wall_ms = timed["wall"].median_ms
        return (timed["dense"].median_ms if "dense" in timed else 1e3 * wall_ms), wall_ms

    return choose_target_length(settings.budget, latencies)


def _dense_runs(
    model: nn.Module, clips: Sequence[Clip], family: Family, step: str, progress: Progress
) -> DenseRuns:
    runs = []
    for number, clip in enumerate(clips):
        progress(step, number, len(clips))
        runs.append(run_dense(model, [clip], family))
    progress(step, len(clips), len(clips))
    return DenseRuns(
        tuple(clips),
        tuple(each.predictions[0] for each in runs),
        tuple(each.qualities[0] for each in runs),
    )


def _few(dense: DenseRuns) -> DenseRuns:
    return DenseRuns(
        dense.clips[:PROBED_CLIPS],
        dense.predictions[:PROBED_CLIPS],
        dense.qualities[:PROBED_CLIPS],
    )


def _sensitivities(
    model: nn.Module, dense: DenseRuns, settings: Settings, family: Family, progress: Progress
) -> pd.DataFrame:
    few = _few(dense)

    def measure() -> pd.DataFrame:
        return probe(
            model,
            few,
            OPERATORS,
            query_factors=QUERY_FACTORS,
            key_value_factors=KEY_VALUE_FACTORS,
            objective=settings.objective,
            family=family,
            progress=lambda done, total: progress("sensitivity", done, total),
        )

    return _cached(model, few, OPERATORS, settings, family, measure, point=(1, 1))


def _paper_layers(
    model: nn.Module,
    dense: DenseRuns,
    settings: Settings,
    family: Family,
    short: TokenLayout,
    source: Source,
    progress: Progress,
) -> tuple[int, ...]:
    """Return the sensitive layers by the paper's probe, its factors brought down to the clips."""
    few = _few(dense)
    point = max(1, min(PAPER_POINT, short.frames // PAPER_RAISE))
    if clamp(LayerRule(1, PAPER_RAISE * point, Operators()), short).key_value <= point:
        return ()  # of one or two frames none can be dropped further

    def measure() -> pd.DataFrame:
        return probe(
            model,
            few,
            OPERATORS[:1],
            key_value_factors=(PAPER_RAISE * point,),
            operating_point=(1, point),
            objective=settings.objective,
            family=family,
            progress=lambda done, total: progress("paper's probe", done, total),
        )

    table = _cached(model, few, OPERATORS[:1], settings, family, measure, point=(1, point))
    try:
        return sensitive_layers(table)
    except SensitivityError:  # no ground truth: judged by what there is
        return sensitive_layers(table, (f"{source}.log_ratio", "deviation.trajectory_step_deg"))


def _cached(
    model: nn.Module,
    dense: DenseRuns,
    operators: Sequence[Operators],
    settings: Settings,
    family: Family,
    measure: Callable[[], pd.DataFrame],
    point: tuple[int, int],
) -> pd.DataFrame:
    if settings.cache is None:
        return measure()
    key = table_key(
        model,
        dense.clips,
        operators,
        family,
        query=QUERY_FACTORS,
        key_value=KEY_VALUE_FACTORS,
        point=point,
        objective=settings.objective,
    )
    return cached_table(settings.cache, key, measure)


def _default_source(split: Split) -> Source:
    return "error" if all(clip.has_ground_truth for clip in _all(split)) else "consistency"


def _all(split: Split) -> tuple[Clip, ...]:
    return (*split.search, *split.selection, *split.held_out)


def _nothing_ran(found: Found) -> str:
    failures = [trial for trial in found.trials if trial.failure]
    if failures:
        return (
            f"all {len(failures)} trials within the budget failed, the first ('{failures[0].name}')"
            f" with {failures[0].failure}"
        )
    return "the search was stopped before a schedule within the budget had run"
