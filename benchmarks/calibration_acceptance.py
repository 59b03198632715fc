"""The bars of calibration, as `benchmarks/calibration.py` judges them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from calibrate.defaults import Source
from calibrate.measure.latency_model import FitReport
from calibrate.measure.quality import Quality
from calibrate.measure.score import score
from calibrate.measure.statistics import PairedRatio, paired_ratio
from calibrate.report.summary import PROFILING

Runs = Mapping[int, Mapping[str, Quality]]
Found = Mapping[tuple[Source, float], Mapping[str, Any]]

RIVALS = ("paper", "uniform", "knapsack", "search")

FIGURES: Mapping[str, Callable[[Quality, Quality], float]] = {
    # Scores of errors are means of logarithms of ratios to dense: their geometric mean.
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
"""Figures that the bars of a mode are about."""

ENOUGH, MOST = 16, 2
"""After so many held-out clips so many of a kind are gone on with: the best of many on all clips is
hardly better than the better of the two best on these."""

LONGER = 0.02
"""Share by which a rival may take longer than ours."""

PASSES = 5
"""Passes of one run of a latency: the samples that ``spark3r bench`` takes."""


@dataclass(frozen=True)
class Bar:
    """One bar: what is asked, what was measured, and whether that meets it (None: not measured)."""

    asked: str
    measured: str
    met: bool | None


def name_of(mode: Source, share: float, kind: str) -> str:
    """Return what a schedule is called in tables."""
    return f"{mode}, wall + {share:.0%}: {kind}"


def latency_bars(found: Found, rounds: Sequence[Mapping[str, float]], wanted: int) -> list[Bar]:
    """Judge latencies; a run is `PASSES` rounds, and its budget follows its own wall and dense.

    Within a run each latency is the median of its passes. Single passes are told beside it.
    """
    complete = max(PASSES, wanted - wanted % PASSES)
    singles = list(rounds)[:complete]
    runs = [
        {name: statistics.median(each[name] for each in some) for name in some[0]}
        for some in (singles[i : i + PASSES] for i in range(0, len(singles), PASSES))
    ]
    bars = []
    for (mode, share), document in found.items():
        name = name_of(mode, share, document["exported"])
        asked = f"{name}: latency 0.90 to 1.05 × budget in 9 of 10 runs"
        if len(singles) < complete:
            bars.append(Bar(asked, f"{len(singles)} of {complete} passes", None))
            continue
        within, told = _within(name, share, runs)
        _, single = _within(name, share, singles)
        bars.append(Bar(asked, f"{told}; of single passes {single}", within >= 0.9 * len(runs)))
    return bars


def _within(name: str, share: float, timed: Sequence[Mapping[str, float]]) -> tuple[int, str]:
    """Return how many latencies are near their budget, and that as text with their range."""
    budgets = [each["wall"] + share * (each["dense"] - each["wall"]) for each in timed]
    parts = [each[name] / ms for each, ms in zip(timed, budgets, strict=True)]
    within = sum(0.90 <= part <= 1.05 for part in parts)
    return within, f"{within} of {len(parts)}, {min(parts):.3f} to {max(parts):.3f}"


def slower(
    found: Found, predicted_ms: Mapping[str, float], rounds: Sequence[Mapping[str, float]]
) -> dict[str, str]:
    """Return rivals that take longer than ours by the latency model and timed beside it, and how.

    What `rivals` lets in on the word of one of them is out on that of both.

    Args:
        found: What was searched.
        predicted_ms: By name.
        rounds: Latencies by name, round by round, ours among them.
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
    """Return runs less those of some schedules."""
    return {
        seed: {name: each for name, each in of_clip.items() if name not in names}
        for seed, of_clip in runs.items()
    }


def accuracy_bar(report: FitReport | None) -> Bar:
    """Judge the latency model."""
    asked = (
        "latency model over 20 schedules, dense + wall made equal: "
        "median error at most 5 %, largest 12 %"
    )
    if report is None:
        return Bar(asked, "", None)
    return Bar(asked, str(report), report.median_error <= 0.05 and report.largest_error <= 0.12)


def error_bars(found: Found, runs: Runs) -> list[Bar]:
    """Judge schedules searched for error by the error on held-out clips."""
    shares = sorted((share for mode, share in found if mode == "error"), reverse=True)
    bars = []
    for share in shares:
        ours = name_of("error", share, found["error", share]["exported"])
        for rival in ("paper", "uniform"):
            best = best_of(found, runs, "error", share, rival, "error")
            ratio = compare(runs, ours, best, "error")
            asked = f"{ours} ÷ {_short(best)}: error, upper bound at most 1.02"
            bars.append(_judged(asked, ratio, lambda found: found.high <= 1.02))
            if share == shares[-1]:
                asked = f"{ours} ÷ {_short(best)}: error, interval below 1"
                bars.append(_judged(asked, ratio, lambda found: found.high < 1))
        ratio = compare(runs, ours, "dense", "error")
        asked = f"{ours} ÷ dense: error at most 1.05"
        bars.append(_judged(asked, ratio, lambda found: found.ratio <= 1.05))
    return bars


def deviation_bars(found: Found, runs: Runs) -> list[Bar]:
    """Judge schedules searched for deviation by the deviation on held-out clips."""
    bars = []
    for mode, share in found:
        if mode != "deviation":
            continue
        ours = name_of(mode, share, found[mode, share]["exported"])
        best = best_of(found, runs, mode, share, "paper", "deviation")
        ratio = compare(runs, ours, best, "deviation")
        asked = f"{ours} ÷ {_short(best)}: deviation at most 0.6 (aim 0.4)"
        bars.append(_judged(asked, ratio, lambda found: found.ratio <= 0.6))
        figure = "log depth and rotation"
        best = best_of(found, runs, mode, share, "uniform", figure)
        ratio = compare(runs, ours, best, figure)
        asked = f"{ours} ÷ {_short(best)}: {figure}, interval below 1 (aim 0.75)"
        bars.append(_judged(asked, ratio, lambda found: found.high < 1))
    return bars


def default_bars(default: Mapping[str, Any] | None) -> list[Bar]:
    """Judge the time of the plain command."""
    asked = ("default run at most 5 minutes", "its profiler at most a third of it")
    if default is None:
        return [Bar(each, "", None) for each in asked]
    total, said = default["total_s"], default["said"]
    profiler = sum(said["seconds"].get(step, 0.0) for step in PROFILING)
    runs = said["dense_runs"]
    told = (
        f"{profiler / total:.0%}; in dense runs of a clip, profiling {runs['profiling']:.0f}, "
        f"search {runs['search']:.0f}"
    )
    return [
        Bar(asked[0], f"{total:.0f} s", total <= 300),
        Bar(asked[1], told, profiler <= total / 3),
    ]


def best_of(found: Found, runs: Runs, mode: Source, share: float, kind: str, figure: str) -> str:
    """Return the name of the schedule that is best on the held-out clips, of those of a kind.

    Args:
        found: All searches.
        runs: On the held-out clips.
        mode: What was searched by.
        share: The budget.
        kind: One of `RIVALS`, or dense.
        figure: What is best by, one of `FIGURES`.
    """
    if kind == "dense":
        return kind
    means = _mean_logs(found, runs, mode, share, kind, figure)
    return min(means, key=means.__getitem__, default=name_of(mode, share, kind))


def contenders(found: Found, runs: Runs) -> set[str]:
    """Return the names of schedules that may still be the best of their kind where it counts.

    By each figure that a bar of their mode is about, all that are not worse than the best of their
    kind beyond the paired interval, `MOST` at most once `ENOUGH` clips ran. The knapsack stays, and
    what is exported.

    Args:
        found: All searches.
        runs: On some of the held-out clips.
    """
    kept = set()
    for mode, share in found:
        for kind in ("paper", "uniform"):
            for figure in JUDGED[mode]:
                means = _mean_logs(found, runs, mode, share, kind, figure)
                ranked = sorted(means, key=means.__getitem__)
                for name in ranked[: MOST if len(runs) >= ENOUGH else None]:
                    ratio = compare(runs, name, ranked[0], figure)
                    if ratio is None or not ratio.is_higher:
                        kept.add(name)
        for kind in ("knapsack", found[mode, share]["exported"]):
            kept.add(name_of(mode, share, kind))
    return kept


def compare(runs: Runs, ours: str, rival: str, figure: str) -> PairedRatio | None:
    """Return how much larger a figure of ours is than a rival's; None where one did not run."""
    if not runs or any(not {ours, rival} <= clip.keys() for clip in runs.values()):
        return None
    of = FIGURES[figure]
    return paired_ratio(
        *(
            {clip["dense"].clip: of(clip[name], clip["dense"]) for clip in runs.values()}
            for name in (ours, rival)
        )
    )


def mean_figures(runs: Runs) -> dict[str, dict[str, float]]:
    """Return every figure and score of every schedule, mean over clips."""
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
    """Return what is exported against every rival, by every figure."""
    rows = []
    for (mode, share), document in found.items():
        ours = name_of(mode, share, document["exported"])
        rivals = [kind for kind in RIVALS if kind != document["exported"]]
        for kind in [*rivals, "dense"]:
            for figure in FIGURES if kind != "dense" else ("error",):
                rival = best_of(found, runs, mode, share, kind, figure)
                ratio = compare(runs, ours, rival, figure)
                if ratio is not None:
                    rows.append({"ours": ours, "rival": rival, "figure": figure, **asdict(ratio)})
    return rows


def _mean_logs(
    found: Found, runs: Runs, mode: Source, share: float, kind: str, figure: str
) -> dict[str, float]:
    """Return the mean logarithm of a figure by name, of the schedules of a kind that ran."""
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


def _judged(asked: str, ratio: PairedRatio | None, meets: Callable[[PairedRatio], bool]) -> Bar:
    return Bar(asked, "", None) if ratio is None else Bar(asked, str(ratio), meets(ratio))
