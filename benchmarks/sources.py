"""How error, consistency and deviation rank schedules.

    python benchmarks/sources.py --clips 24 [--minutes 5]

This script runs about fifty schedules on held-out rendered clips: with the paper's operators and
with ours; reducing queries, keys and values, or both; uniform and drawn per layer; mild to harsh.
It prints Spearman's rank correlation over the schedules between each figure and the error. The
figure comes from one half of the clips and the error from the other, over many random halves,
because a search never sees the clips on which its result is used. The correlation of the error with
itself on other clips is an upper bound. Intervals are bootstrapped over clips, and over clips and
schedules.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from quality_cache import add_arguments, factors, open_cache
from results_io import print_markdown, write_result
from scipy.stats import rankdata

from calibrate.defaults import SOURCES, Objective
from calibrate.measure.quality import Quality
from calibrate.measure.score import score
from spark3r import LayerRule, Operators, QueryMerging, Schedule, TokenStride
from spark3r.benchmark.treatments import THINNED
from spark3r.metrics import collapsed
from spark3r.reference.scenes.seeds import EVALUATION

FIRST_CLIP = 2000  # among the evaluation seeds, beyond those of training.evaluate and other scripts
PAPER = Operators()
HALF = Operators(key_value=TokenStride(keep_special=True, keep_anchor=True, mass_correction=0.5))
LEVELS = {"mild": (1, 2, 4), "middle": (2, 4, 8, 16), "harsh": (8, 16, 32, 64)}
QUERY_LEVELS = {"mild": (1, 2), "middle": (2, 3, 4), "harsh": (4, 8, 16)}
OBJECTIVES: tuple[Objective, ...] = ("balanced", "depth", "pose", "points")
SINGLE = ("depth_log", "rotation_deg", "translation_deg", "points")
COLUMNS = ("balanced", "depth", "pose", "points", "auc_30")
SPLITS = 1000
TAKEN = (1, 2, 4, 8, 12, 16)

Floats = npt.NDArray[np.float64]
Figure = Callable[[Quality, Quality], float]
"""A figure of a run, which may depend on the dense run."""


def schedules(layers: int, seed: int = 0) -> dict[str, Schedule]:
    """Return every schedule by name. A name begins with the axes that the schedule reduces."""
    rng = random.Random(seed)
    found: dict[str, Schedule] = {}

    def uniform(axis: str, query: int, key_value: int, operators: Operators, name: str) -> None:
        found[f"{axis}, {name}, {query}/{key_value} everywhere"] = Schedule.uniform(
            layers, query, key_value, operators=operators
        )

    def drawn(axis: str, level: str, operators: Sequence[Operators], name: str) -> None:
        rules = tuple(
            LayerRule(
                1 if axis == "keys" else rng.choice(QUERY_LEVELS[level]),
                1 if axis == "queries" else rng.choice(LEVELS[level]),
                rng.choice(operators) if len(operators) > 1 else None,
            )
            for _ in range(layers)
        )
        number = sum(key.startswith(f"{axis}, {name}, {level}") for key in found)
        found[f"{axis}, {name}, {level} per layer {number}"] = Schedule(rules, operators[0])

    for factor in (2, 4, 8, 16, 32):
        uniform("keys", 1, factor, PAPER, "frames")
        uniform("keys", 1, factor, THINNED, "patches")
    uniform("keys", 1, 8, HALF, "patches, half mass")
    for factor in (2, 4, 8, 16):
        uniform("queries", factor, 1, PAPER, "groups")
    for query, key_value in ((2, 4), (2, 16), (4, 8), (8, 32)):
        uniform("both", query, key_value, PAPER, "frames")
        uniform("both", query, key_value, THINNED, "patches")
    for level in LEVELS:
        for _ in range(2):
            drawn("keys", level, [PAPER], "frames")
            drawn("keys", level, [THINNED], "patches")
            drawn("queries", level, [PAPER], "groups")
            drawn("both", level, [PAPER], "frames")
            drawn("both", level, [THINNED], "patches")
        drawn("keys", level, [PAPER, THINNED, HALF], "mixed")
        drawn("both", level, [PAPER, THINNED, HALF], "mixed")
    # These may collapse: keys and values of frame 0 only, and one query per frame.
    uniform("keys", 1, 10_000, PAPER, "frames")
    uniform("queries", 64, 1, Operators(QueryMerging(group=1)), "inside a frame")
    return found


def predictors() -> dict[str, Figure]:
    """Return the figures to rank schedules by, from a run and the dense run; smaller is better."""

    def with_deviation(weight: float) -> Figure:
        return lambda run, dense: (
            score(run, dense, "error") + weight * score(run, dense, "deviation")
        )

    def alone(metric: str) -> Figure:
        return lambda run, dense: float(getattr(run.deviation, metric))

    found: dict[str, Figure] = {}
    for source in SOURCES:
        for objective in OBJECTIVES if source != "consistency" else OBJECTIVES[:1]:
            name = source if source == "consistency" else f"{source}, {objective}"
            found[name] = partial(score, source=source, objective=objective)
    for weight in (4, 10, 30):
        found[f"error + {weight} × deviation"] = with_deviation(weight)
    for metric in SINGLE:
        found[f"deviation, {metric} alone"] = alone(metric)
    return found


def targets() -> dict[str, Figure]:
    """Return the errors that a ranking should agree with, by name."""
    found: dict[str, Figure] = {
        objective: partial(score, source="error", objective=objective) for objective in OBJECTIVES
    }
    found["auc_30"] = lambda run, dense: (
        0.0 if run.error is None or dense.error is None else dense.error.auc_30 - run.error.auc_30
    )
    return found


def table(
    runs: Mapping[int, Mapping[str, Quality]],
    names: Sequence[str],
    figure: Figure,
) -> Floats:
    """Return a figure of every schedule on every clip, ``[schedules, clips]``."""
    return np.array(
        [[figure(clip[name], clip["dense"]) for clip in runs.values()] for name in names]
    )


def spearman(left: Floats, right: Floats) -> Floats:
    """Return Spearman's rank correlation row by row, 0 where a row is constant."""
    ranks = [rankdata(values, axis=-1) for values in (left, right)]
    a, b = (each - each.mean(-1, keepdims=True) for each in ranks)
    size = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.asarray((a * b).sum(-1) / np.where(size > 0, size, 1.0))


@dataclass(frozen=True)
class Agreement:
    """Agreement of a figure's ranking of schedules with that of an error.

    Attributes:
        other_clips: Spearman with the error on other clips, averaged over the random halves.
        same_clips: Spearman on all clips.
        by_clips: Bootstraps of ``other_clips`` over clips, `[SPLITS]`, with the same draws for all
            figures.
        by_both: Bootstraps over clips and schedules, `[SPLITS]`.
    """

    other_clips: float
    same_clips: float
    by_clips: Floats
    by_both: Floats

    def record(self) -> dict[str, Any]:
        """Return the correlations and their 95 % intervals for the result file."""
        return {
            "other_clips": self.other_clips,
            "same_clips": self.same_clips,
            "interval_clips": _interval(self.by_clips),
            "interval_clips_and_schedules": _interval(self.by_both),
        }


def agreement(
    figures: Floats, errors: Floats, rows: Sequence[int], taken: int | None = None
) -> Agreement:
    """Return the agreement of a figure with the error on other clips.

    Args:
        figures: The figure, ``[schedules, clips]``.
        errors: The error, ``[schedules, clips]``.
        rows: Indices of the schedules to compare.
        taken: Number of clips that the figure comes from; None for half of them. The error always
            comes from the other half.
    """
    rng = np.random.default_rng(0)
    figures, errors = figures[list(rows)], errors[list(rows)]
    schedules, clips = figures.shape
    half = clips // 2
    order = np.array([rng.permutation(clips) for _ in range(SPLITS)])
    one, other = order[:, : half if taken is None else taken], order[:, half:]
    again = [rng.integers(0, each.shape[1], each.shape) for each in (one, other)]
    left, right = _means(figures, one), _means(errors, other)
    by_clips = [
        _means(values, np.take_along_axis(part, drawn, axis=1))
        for values, part, drawn in zip((figures, errors), (one, other), again, strict=True)
    ]
    some = rng.integers(0, schedules, (SPLITS, schedules))
    by_both = [np.take_along_axis(values, some, axis=1) for values in by_clips]
    return Agreement(
        float(spearman(left, right).mean()),
        float(spearman(figures.mean(1), errors.mean(1))),
        spearman(*by_clips),
        spearman(*by_both),
    )


def _means(values: Floats, clips: npt.NDArray[np.int64]) -> Floats:
    """Return the mean of each schedule over some clips ``[draws, n]``: ``[draws, schedules]``."""
    return np.asarray(values[:, clips].mean(-1).T)


def _interval(found: Floats) -> list[float]:
    return [float(bound) for bound in np.percentile(found, (2.5, 97.5))]


def subsets(names: Sequence[str], errors: Floats) -> dict[str, list[int]]:
    """Return groups of schedules: all, the half with the smaller errors, and those of each axis."""
    order = np.argsort(errors.mean(1))
    found = {
        "all": list(range(len(names))),
        "milder half": [int(i) for i in order[: len(names) // 2]],
    }
    for axis in ("keys", "queries", "both"):
        found[axis] = [i for i, name in enumerate(names) if name.startswith(f"{axis},")]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=24, help="held-out clips (default: 24)")
    parser.add_argument("--skip", type=int, default=0, help="number of clips to skip at the start")
    add_arguments(parser, frames=48, output="sources.json")
    options = parser.parse_args()
    cache = open_cache(options)
    first = FIRST_CLIP + options.skip
    todo = schedules(cache.runner.depth)
    runs = cache.complete(EVALUATION[first : first + options.clips], todo)
    print(f"{len(runs)} of {options.clips} clips of {options.frames} frames, {len(todo)} schedules")
    if len(runs) < max(4, options.clips):
        raise SystemExit("the time is over before all clips are measured: run again")

    names = list(todo)
    errors = {name: table(runs, names, figure) for name, figure in targets().items()}
    groups = subsets(names, errors["balanced"])
    rows: dict[str, dict[str, Any]] = {}
    against: dict[str, Agreement] = {}
    for name, figure in predictors().items():
        figures = table(runs, names, figure)

        def record(
            target: str, members: Sequence[int], taken: int | None = None, f: Floats = figures
        ) -> dict[str, Any]:
            return agreement(f, errors[target], members, taken).record()

        against[name] = agreement(figures, errors["balanced"], groups["all"])
        rows[name] = {
            "like": {column: record(column, groups["all"]) for column in COLUMNS},
            "among": {group: record("balanced", some) for group, some in groups.items()},
            "from": {
                str(taken): record("balanced", groups["all"], taken)
                for taken in TAKEN
                if taken <= len(runs) // 2
            },
        }
    for name, row in rows.items():
        lead = against[name].by_both - against["consistency"].by_both
        row["lead_over_consistency"] = [float(lead.mean()), *_interval(lead)]
    show(rows, {group: len(members) for group, members in groups.items()})
    guarded = Counter(
        (name, guard)
        for clip in runs.values()
        for name in names
        for guard in collapsed(clip[name].consistency, clip["dense"].consistency)
    )
    print("\nruns that the guard calls collapsed, by schedule and vanished figure:")
    for (name, guard), count in sorted(guarded.items()):
        print(f"  {name}: {guard} on {count} of {len(runs)} clips")
    document = {
        **cache.record(),
        "clips": [clip["dense"].clip for clip in runs.values()],
        "splits": SPLITS,
        "rows": rows,
        "groups": groups,
        "collapsed": [[name, guard, count] for (name, guard), count in sorted(guarded.items())],
        "schedules": {
            name: {
                "factors": factors(todo[name]),
                **{
                    figure: float(table(runs, [name], call).mean())
                    for figure, call in predictors().items()
                },
            }
            for name in names
        },
    }
    write_result(document, options.output)


def show(rows: Mapping[str, Mapping[str, Any]], groups: Mapping[str, int]) -> None:
    """Print the Markdown tables."""
    print("\nSpearman with the error on other clips, and 95 % interval over clips:\n")
    print_markdown(
        ("ranked by", *COLUMNS),
        [(name, *(_cell(row["like"][each]) for each in COLUMNS)) for name, row in rows.items()],
    )
    print("\nAmong some of the schedules, balanced error, interval over clips and schedules:\n")
    print_markdown(
        ("ranked by", *(f"{group} ({count})" for group, count in groups.items())),
        [
            (name, *(_cell(row["among"][g], "interval_clips_and_schedules") for g in groups))
            for name, row in rows.items()
        ],
    )
    low, high = rows["deviation, balanced"]["lead_over_consistency"][1:]
    print(f"\ndeviation minus consistency, over clips and schedules: {low:+.2f} to {high:+.2f}")
    sizes = list(next(iter(rows.values()))["from"])
    print("\nWith the figure from fewer clips, balanced error on half of the clips:\n")
    print_markdown(
        ("ranked by", *sizes),
        [(name, *(_cell(row["from"][size]) for size in sizes)) for name, row in rows.items()],
    )


def _cell(found: Mapping[str, Any], interval: str = "interval_clips") -> str:
    low, high = found[interval]
    return f"{found['other_clips']:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
