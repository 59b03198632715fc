"""Length of calibration clips: drift by clip length, and its knapsacks at other lengths.

    python benchmarks/lengths.py [--lengths 24 48 128 256] [--budgets 25 10]

Drift of every factor is measured on clips of several lengths, which sample the same paths. For each
length the knapsack, without probes and without a search, solves the same budgets at the target
length (`python benchmarks/calibration.py --only table` times it first). These schedules and the
frontier of uniform schedules then run on held-out clips of every length. Fewer long clips run,
because they take longer.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from typing import Any

import pandas as pd
import stages
from calibration_acceptance import FIGURES
from quality_cache import QualityCache, add_arguments, factors, open_cache
from results_io import print_markdown, write_result

from calibrate.defaults import KEY_VALUE_FACTORS, OPERATORS, QUERY_FACTORS
from calibrate.measure.probe import FAITHFULNESS
from calibrate.measure.residual_drift import drift
from calibrate.search.problem import LatencyLimit, SearchProblem
from spark3r import LengthRule, Schedule
from spark3r.reference.scenes.render import rendered_clip
from spark3r.reference.scenes.seeds import CALIBRATION, EVALUATION
from spark3r.schedule import operators_text

FIRST_CALIBRATION, FIRST_HELD_OUT = 300, 5100
SHOWN_FACTORS = (4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[24, 48, 128, 256], help="frames per clip"
    )
    stages.add_target_frames(parser)
    stages.add_budgets(parser, [25, 10])
    parser.add_argument(
        "--total-frames",
        type=int,
        default=192,
        help="frames of all clips of one length together; twice as many are held out "
        "(default: 192)",
    )
    add_arguments(parser, frames=24, output="lengths.json")
    options = parser.parse_args()
    shortest = open_cache(options)
    caches = [replace(shortest, frames=frames) for frames in options.lengths]
    drifts = {each.frames: measured_drift(each, options.total_frames) for each in caches}
    rows = drift_rows(drifts)
    show_drift(rows, options.lengths)
    document = {
        "target_frames": options.target_frames,
        "drift": rows,
        "budgets": [compared(caches, drifts, percent, options) for percent in options.budgets],
    }
    write_result(shortest.record() | document, options.output)


def measured_drift(cache: QualityCache, total_frames: int) -> pd.DataFrame:
    """Return the drift of all factors on clips of one length."""
    count = max(1, total_frames // cache.frames)
    seeds = CALIBRATION[FIRST_CALIBRATION : FIRST_CALIBRATION + count]
    return drift(
        cache.runner,
        [rendered_clip(seed, cache.frames) for seed in seeds],
        OPERATORS,
        query_factors=QUERY_FACTORS,
        key_value_factors=KEY_VALUE_FACTORS,
    )


def drift_rows(drifts: dict[int, pd.DataFrame]) -> list[dict[str, Any]]:
    """Return drift by length, operators, axis and factor, root mean square over layers."""
    rows = []
    for frames, table in drifts.items():
        for each in OPERATORS:
            own = table[table["operators"] == operators_text(each)]
            for (axis, factor), part in own.groupby(["axis", "factor"]):
                value = math.sqrt(statistics.fmean(part["mean"] ** 2))
                is_query = axis == "query"
                what = f"queries {each.query.describe()}" if is_query else each.key_value.describe()
                rows.append({"frames": frames, "what": what, "factor": int(factor), "drift": value})
    return rows


def show_drift(rows: list[dict[str, Any]], lengths: list[int]) -> None:
    """Print the drift of some factors as a Markdown table."""
    cells = []
    known = {(row["what"], row["factor"], row["frames"]): row["drift"] for row in rows}
    for what in dict.fromkeys(row["what"] for row in rows):
        for factor in SHOWN_FACTORS:
            drifts = (known.get((what, factor, frames)) for frames in lengths)
            texts = ("" if drift is None else f"{100 * drift:.2f}" for drift in drifts)
            cells.append((f"{what}, factor {factor}", *texts))
    print_markdown(("drift, %", *lengths), cells)


def compared(
    caches: list[QualityCache],
    drifts: dict[int, pd.DataFrame],
    percent: float,
    options: argparse.Namespace,
) -> dict[str, object]:
    """Run the knapsacks of all lengths and uniform schedules at all lengths, and print them."""
    target = options.target_frames
    table = stages.latency_table(caches[0], stages.folder_of(caches[0]), target)
    schedules: dict[str, Schedule] = {}
    for frames, measured in drifts.items():
        problem = SearchProblem(
            sensitivity=measured.assign(metric=FAITHFULNESS),
            latency=table.model,
            layout=table.layout,
            short=caches[-1].layout,  # allows all factors, which short clips lower
            length=LengthRule("constant", target, caches[0].frames, target),
            sensitive=(),
            goal=LatencyLimit(stages.budget_ms(table, percent / 100)),
        )
        found = problem.knapsack()
        assert found is not None
        schedules[f"knapsack of {frames} frames"] = found
    starts = {
        name: schedule
        for name, schedule in problem.initial_schedules().items()
        if not name.startswith("knapsack ")  # for other goals
    }
    schedules |= {name: each for name, each in starts.items() if name.startswith("uniform")}
    lengths = [each.frames for each in caches]
    deviations: dict[str, dict[int, float]] = {name: {} for name in schedules}
    for cache in caches:
        count = max(2, 2 * options.total_frames // cache.frames)
        seeds = EVALUATION[FIRST_HELD_OUT : FIRST_HELD_OUT + count]
        runs = cache.complete(seeds, schedules)
        for name in schedules if runs else ():
            logs = (
                math.log(FIGURES["deviation"](clip[name], clip["dense"])) for clip in runs.values()
            )
            deviations[name][cache.frames] = math.exp(statistics.fmean(logs))
    rows = []
    for name, row in deviations.items():
        cells = (f"{100 * row[frames]:.3f}" if frames in row else "" for frames in lengths)
        rows.append((name, *cells, factors(schedules[name])))
    print()
    print_markdown((f"wall + {percent:g} %: deviation, %", *lengths, "factors"), rows)
    return {
        "percent": percent,
        "schedules": {name: factors(each) for name, each in schedules.items()},
        "deviation": deviations,
    }


if __name__ == "__main__":
    main()
