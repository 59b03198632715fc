"""Acceptance criteria of calibration, which `benchmarks/calibration.py` checks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from acceptance import Criterion

from calibrate.defaults import Source
from calibrate.measure.latency_model import FitReport
from calibrate.measure.quality import Quality
from calibrate.measure.score import score
from calibrate.measure.statistics import PairedRatio, paired_ratio
from calibrate.report.summary import PROFILING

Runs = Mapping[int, Mapping[str, Quality]]
"""Qualities by clip (seed) and schedule name, ``dense`` among them."""

Found = Mapping[tuple[Source, float], Mapping[str, Any]]
"""Results of the searches, by mode and by budget as a share of the way from the wall to dense."""

BASELINES = ("paper", "uniform", "knapsack", "search")
"""Kinds of schedule that an exported schedule is compared with."""

FIGURES: Mapping[str, Callable[[Quality, Quality], float]] = {
    # An error score is the mean logarithm of error ÷ dense error; this is their geometric mean.
    "error": lambda run, dense: math.exp(score(run, dense, "error")),
    "deviation": lambda run, dense: score(run, dense, "deviation"),
    "log depth and rotation": lambda run, dense: math.sqrt(
        run.deviation.depth_log * run.deviation.rotation_deg
    ),
}

JUDGED: Mapping[Source, Sequence[str]] = {
    "error": ("error",),
    "consistency": ("error",),
    "deviation": ("deviation", "log depth and rotation"),
}
"""Figures that the criteria of each mode use."""

SHORTLIST_AFTER, SHORTLISTED = 16, 2
"""From the first number of clips on, at most the second number of schedules of a kind remain. The
best of many schedules on all clips is hardly better than the better of the two best on 16."""

LONGER = 0.02
"""Share by which a baseline may be slower than the exported schedule."""

PASSES = 5
"""Passes in one run of a latency measurement, as in ``spark3r bench``."""


def name_of(mode: Source, share: float, kind: str) -> str:
    """Return the name of a schedule in tables."""
    return f"{mode}, wall + {share:.0%}: {kind}"


def latency_criteria(
    found: Found, rounds: Sequence[Mapping[str, float]], wanted: int
) -> list[Criterion]:
    """Judge the latencies of the exported schedules.

    A run is the median of `PASSES` rounds. Its budget follows from its own wall and dense
    latencies. The result for single passes is added as text.

    Args:
        found: Results of the searches.
        rounds: Latencies in milliseconds by name, one mapping per round.
        wanted: Number of rounds that the criteria need.
    """
    complete = max(PASSES, wanted - wanted % PASSES)
    singles = list(rounds)[:complete]
    runs = [
        {name: statistics.median(each[name] for each in some) for name in some[0]}
        for some in (singles[i : i + PASSES] for i in range(0, len(singles), PASSES))
    ]
    criteria = []
    for (mode, share), document in found.items():
        name = name_of(mode, share, document["exported"])
        requirement = f"{name}: latency 0.90 to 1.05 × budget in 9 of 10 runs"
        if len(singles) < complete:
            criteria.append(Criterion(requirement, f"{len(singles)} of {complete} passes", None))
            continue
        within, text = _within(name, share, runs)
        _, single = _within(name, share, singles)
        text = f"{text}; of single passes {single}"
        criteria.append(Criterion(requirement, text, within >= 0.9 * len(runs)))
    return criteria


def _within(name: str, share: float, timed: Sequence[Mapping[str, float]]) -> tuple[int, str]:
    """Return how many latencies are near their budget, and a text with the count and the range."""
    budgets = [each["wall"] + share * (each["dense"] - each["wall"]) for each in timed]
    parts = [each[name] / ms for each, ms in zip(timed, budgets, strict=True)]
    within = sum(0.90 <= part <= 1.05 for part in parts)
    return within, f"{within} of {len(parts)}, {min(parts):.3f} to {max(parts):.3f}"


def slower_baselines(
    found: Found, predicted_ms: Mapping[str, float], rounds: Sequence[Mapping[str, float]]
) -> dict[str, str]:
    """Return the baselines that are slower than the exported schedule, each with its two ratios.

    `baselines.comparable_baselines` admits a schedule if one of two estimates calls it fast enough.
    It is excluded here if both the latency model and the timings call it too slow.

    Args:
        found: Results of the searches.
        predicted_ms: Predicted latencies by name, in milliseconds.
        rounds: Measured latencies by name, in milliseconds, one mapping per round.
    """
    longer = {}
    for (mode, share), document in found.items():
        ours = name_of(mode, share, document["exported"])
        for name in rounds[0] if rounds else ():
            if not name.startswith(name_of(mode, share, "")) or name == ours:
                continue
            predicted = predicted_ms[name] / predicted_ms[ours]
            measured = statistics.median(each[name] / each[ours] for each in rounds)
            if min(predicted, measured) > 1 + LONGER:
                longer[name] = f"{predicted:.3f} predicted, {measured:.3f} measured"
    return longer


def without(runs: Runs, names: Collection[str]) -> dict[int, dict[str, Quality]]:
    """Return the runs without some schedules."""
    return {
        seed: {name: each for name, each in of_clip.items() if name not in names}
        for seed, of_clip in runs.items()
    }


def accuracy_criterion(report: FitReport | None) -> Criterion:
    """Judge the latency model."""
    requirement = (
        "latency model over 20 schedules, dense + wall made equal: "
        "median error at most 5 %, largest 12 %"
    )
    if report is None:
        return Criterion(requirement, "", None)
    met = report.median_error <= 0.05 and report.largest_error <= 0.12
    return Criterion(requirement, str(report), met)


def error_criteria(found: Found, runs: Runs) -> list[Criterion]:
    """Judge schedules searched for error by their error on held-out clips."""
    shares = sorted((share for mode, share in found if mode == "error"), reverse=True)
    criteria = []
    for share in shares:
        ours = name_of("error", share, found["error", share]["exported"])
        for kind in ("paper", "uniform"):
            best = best_of(found, runs, "error", share, kind, "error")
            ratio = compare(runs, ours, best, "error")
            requirement = f"{ours} ÷ {_short(best)}: error, upper bound at most 1.02"
            criteria.append(_judged(requirement, ratio, lambda found: found.high <= 1.02))
            if share == shares[-1]:
                requirement = f"{ours} ÷ {_short(best)}: error, interval below 1"
                criteria.append(_judged(requirement, ratio, lambda found: found.high < 1))
        ratio = compare(runs, ours, "dense", "error")
        requirement = f"{ours} ÷ dense: error at most 1.05"
        criteria.append(_judged(requirement, ratio, lambda found: found.ratio <= 1.05))
    return criteria


def deviation_criteria(found: Found, runs: Runs) -> list[Criterion]:
    """Judge schedules searched for deviation by their deviation on held-out clips."""
    criteria = []
    for mode, share in found:
        if mode != "deviation":
            continue
        ours = name_of(mode, share, found[mode, share]["exported"])
        best = best_of(found, runs, mode, share, "paper", "deviation")
        ratio = compare(runs, ours, best, "deviation")
        requirement = f"{ours} ÷ {_short(best)}: deviation at most 0.6 (aim 0.4)"
        criteria.append(_judged(requirement, ratio, lambda found: found.ratio <= 0.6))
        figure = "log depth and rotation"
        best = best_of(found, runs, mode, share, "uniform", figure)
        ratio = compare(runs, ours, best, figure)
        requirement = f"{ours} ÷ {_short(best)}: {figure}, interval below 1 (aim 0.75)"
        criteria.append(_judged(requirement, ratio, lambda found: found.high < 1))
    return criteria


def default_criteria(default: Mapping[str, Any] | None) -> list[Criterion]:
    """Judge the time that `calibrate` takes with its default settings."""
    requirements = ("default run at most 170 s (aim 110)", "its profiler at most a third of it")
    if default is None:
        return [Criterion(each, "", None) for each in requirements]
    total, summary = default["total_s"], default["summary"]
    profiler = sum(summary["seconds"].get(step, 0.0) for step in PROFILING)
    runs = summary["dense_runs"]
    text = (
        f"{profiler / total:.0%}; in dense runs of a clip, profiling {runs['profiling']:.0f}, "
        f"search {runs['search']:.0f}"
    )
    return [
        Criterion(requirements[0], f"{total:.0f} s", total <= 170),
        Criterion(requirements[1], text, profiler <= total / 3),
    ]


def best_of(found: Found, runs: Runs, mode: Source, share: float, kind: str, figure: str) -> str:
    """Return the name of the schedule of a kind that is best on the held-out clips.

    Args:
        found: Results of the searches.
        runs: Qualities on the held-out clips.
        mode: The quality source of the search.
        share: The budget.
        kind: One of `BASELINES`, or ``dense``.
        figure: The figure to minimise, one of `FIGURES`.
    """
    if kind == "dense":
        return kind
    means = _mean_logs(found, runs, mode, share, kind, figure)
    return min(means, key=means.__getitem__, default=name_of(mode, share, kind))


def remaining_candidates(found: Found, runs: Runs) -> set[str]:
    """Return the names of schedules that further clips could still show to be the best.

    For each figure that the criteria of a mode use, these are the schedules that are not worse than
    the best of their kind beyond the paired interval; from `SHORTLIST_AFTER` clips on at most
    `SHORTLISTED` of them. The knapsack's schedule and the exported one always remain.

    Args:
        found: Results of the searches.
        runs: Qualities on the held-out clips that were run so far.
    """
    remaining = set()
    for mode, share in found:
        for kind in ("paper", "uniform"):
            for figure in JUDGED[mode]:
                means = _mean_logs(found, runs, mode, share, kind, figure)
                ranked = sorted(means, key=means.__getitem__)
                for name in ranked[: SHORTLISTED if len(runs) >= SHORTLIST_AFTER else None]:
                    ratio = compare(runs, name, ranked[0], figure)
                    if ratio is None or not ratio.is_higher:
                        remaining.add(name)
        for kind in ("knapsack", found[mode, share]["exported"]):
            remaining.add(name_of(mode, share, kind))
    return remaining


def compare(runs: Runs, ours: str, baseline: str, figure: str) -> PairedRatio | None:
    """Return a figure of ours ÷ the baseline's over the clips; None where one did not run."""
    if not runs or any(not {ours, baseline} <= clip.keys() for clip in runs.values()):
        return None
    of = FIGURES[figure]
    return paired_ratio(
        *(
            {clip["dense"].clip: of(clip[name], clip["dense"]) for clip in runs.values()}
            for name in (ours, baseline)
        )
    )


def mean_figures(runs: Runs) -> dict[str, dict[str, float]]:
    """Return every figure and score of every schedule, averaged over the clips."""
    means: dict[str, dict[str, float]] = {}
    for name in next(iter(runs.values()), {}):
        tables = []
        for clip in runs.values():
            scores = {
                f"score.{source}": score(clip[name], clip["dense"], source)
                for source in get_args(Source)
            }
            tables.append(scores | clip[name].figures())
        common = [key for key in tables[0] if all(key in table for table in tables)]
        means[name] = {
            key: math.fsum(table[key] for table in tables) / len(tables) for key in common
        }
    return means


def comparisons(found: Found, runs: Runs) -> list[dict[str, Any]]:
    """Return the comparison of each exported schedule with every baseline, by every figure."""
    rows = []
    for (mode, share), document in found.items():
        ours = name_of(mode, share, document["exported"])
        kinds = [kind for kind in BASELINES if kind != document["exported"]]
        for kind in [*kinds, "dense"]:
            for figure in FIGURES if kind != "dense" else ("error",):
                best = best_of(found, runs, mode, share, kind, figure)
                ratio = compare(runs, ours, best, figure)
                if ratio is not None:
                    rows.append({"ours": ours, "baseline": best, "figure": figure, **asdict(ratio)})
    return rows


def _mean_logs(
    found: Found, runs: Runs, mode: Source, share: float, kind: str, figure: str
) -> dict[str, float]:
    """Return the mean logarithm of a figure, by name, for the schedules of a kind that ran."""
    of = FIGURES[figure]
    ran = next(iter(runs.values()), {})
    names = [
        name_of(mode, share, name)
        for name in found[mode, share]["schedules"]
        if name.partition(" ")[0] == kind
    ]
    return {
        name: math.fsum(math.log(of(clip[name], clip["dense"])) for clip in runs.values())
        / len(runs)
        for name in names
        if name in ran
    }


def _short(name: str) -> str:
    return name.partition(": ")[2]


def _judged(
    requirement: str, ratio: PairedRatio | None, meets: Callable[[PairedRatio], bool]
) -> Criterion:
    if ratio is None:
        return Criterion(requirement, "", None)
    return Criterion(requirement, str(ratio), meets(ratio))
