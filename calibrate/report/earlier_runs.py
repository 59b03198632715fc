"""What a profile holds of earlier runs, to be drawn beside what is solved from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spark3r.profile import Profile
from spark3r.profile.evidence import BaselineRun, Measurement, ScheduleRun
from spark3r.schedule import LayerRule, Schedule

from ..defaults import Objective, Source
from ..measure.score import score
from ..measure.timing import pace_of
from ..search.baselines import paper_schedules
from ..search.problem import Problem
from .profile import recorded_quality


@dataclass(frozen=True)
class KeptRun:
    """A schedule that was run for a profile.

    Attributes:
        name: The schedule's name there, or ``uniform`` or ``paper``.
        latency_ms: Per clip, as measured there, at the pace that the latency model has; predicted
            where it was not measured, or not at this length.
        score: Mean over the clips it was run on.
    """

    name: str
    latency_ms: float
    score: float


@dataclass(frozen=True)
class Kept:
    """What a profile holds that is drawn beside what was solved from it.

    Attributes:
        profile: Name of the profile's file.
        runs: The schedules whose quality is known.
        source: What these are judged by: deviation where the profile does not hold what another
            source needs.
        paper: The paper's schedule scaled to the budget, not run; None where the profile does not
            tell which layers are sensitive, or no such schedule meets the budget.
    """

    profile: str
    runs: tuple[KeptRun, ...]
    source: Source
    paper: Schedule | None


def kept(
    profile: Profile,
    measurement: Measurement,
    name: str,
    problem: Problem,
    objective: Objective,
    budget_ms: float,
) -> Kept:
    """Return what a profile holds of earlier runs.

    Args:
        profile: The profile.
        measurement: The one of its measurements that is solved from.
        name: Name of its file.
        problem: What is solved from it.
        objective: Which metrics count.
        budget_ms: Latency that a clip may take.
    """
    source = problem.source
    scores = _scores(measurement, source, objective)
    if scores is None:
        source = "deviation"
        scores = _scores(measurement, source, objective) or {}
    return Kept(
        name,
        tuple(
            KeptRun(name, latency_ms, scores[name])
            for name, latency_ms in _latencies_ms(profile, measurement, problem).items()
            if name in scores
        ),
        source,
        _scaled_paper(profile, measurement, problem, budget_ms),
    )


def recorded_runs(measurement: Measurement) -> tuple[ScheduleRun | BaselineRun, ...]:
    """Return what was run for a measurement, its schedules first."""
    return (*measurement.schedules, *measurement.baselines)


def _name(run: ScheduleRun | BaselineRun) -> str:
    return run.schedule if isinstance(run, ScheduleRun) else run.baseline


def _scores(
    measurement: Measurement, source: Source, objective: Objective
) -> dict[str, float] | None:
    """Return the mean score of each run that has figures; None if that of any cannot be told."""
    dense = {each.clip: recorded_quality(each) for each in measurement.dense.figures}
    found: dict[str, float] = {}
    for run in recorded_runs(measurement):
        values = []
        for figures in run.figures:
            quality = recorded_quality(figures)
            # Deviation is from dense already, so that the run itself will do to compare with.
            reference = quality if source == "deviation" else dense.get(figures.clip)
            if quality is None or reference is None:
                return None
            if source == "error" and None in (quality.error, reference.error):
                return None
            values.append(score(quality, reference, source, objective))
        if values:
            found[_name(run)] = math.fsum(values) / len(values)
    return found


def _latencies_ms(profile: Profile, measurement: Measurement, problem: Problem) -> dict[str, float]:
    """Return the latency of each run as the latency model has it, measured where it was."""
    predicted = {}
    for run in recorded_runs(measurement):
        schedule = (
            profile.schedule(run.schedule)
            if isinstance(run, ScheduleRun)
            else Schedule(_rules(run), run.operators.operators())
        )
        predicted[_name(run)] = problem.predict_ms(schedule)
    if measurement.frames != problem.layout.frames:
        return predicted
    measured = {
        _name(run): run.latency.median_ms
        for run in recorded_runs(measurement)
        if run.latency is not None
    }
    wall = (measurement.wall.median_ms, problem.latency.wall_ms(problem.layout))
    pace = pace_of([(ms, predicted[name]) for name, ms in measured.items()], wall)
    return predicted | {name: ms / pace for name, ms in measured.items()}


def _rules(run: BaselineRun) -> tuple[LayerRule, ...]:
    return tuple(LayerRule(query, key_value) for query, key_value in run.factors)


def _scaled_paper(
    profile: Profile, measurement: Measurement, problem: Problem, budget_ms: float
) -> Schedule | None:
    """Return the paper schedule of a profile, scaled to another budget.

    Sensitive are the layers that keep more keys and values in it; where all keep as many, none is.
    Of those that meet the budget the one with the query factor nearest to its own is taken.
    """
    known = [_rules(run) for run in measurement.baselines if run.baseline == "paper"]
    known += [each.schedule().layers for each in profile.schedules if each.name == "paper"]
    if not known:
        return None
    rules = known[0]
    tiers = sorted({rule.key_value for rule in rules})
    sensitive = [layer for layer, rule in enumerate(rules) if [rule.key_value] == tiers[:-1]]
    scaled = paper_schedules(
        len(rules),
        sensitive,
        problem.length,
        problem.short,
        lambda schedule: problem.predict_ms(schedule) <= budget_ms,
    )
    query = rules[0].query
    return min(scaled.values(), key=lambda each: abs(each.layers[0].query - query), default=None)
