"""What the knapsack should add up: damages or their squares, of which factors?

    python benchmarks/degradation.py [--clips 48] [--budgets 50 25 10]

The knapsack alone, without a search, under three budgets (wall + so many percent of the way to
dense at the target length; `python benchmarks/calibration.py --only table` times it first), on
clips that nothing was measured on. Sensitivities are measured at *few* factors, powers of two up to
4 for queries and 32 for keys and values; *between* takes what lies between them to be linear in the
logarithm of the factor; *all* is what `calibrate` measures. Compared, clip by clip, with plain sums
over few.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import product
from pathlib import Path
from unittest.mock import patch

import stages
from calibration_acceptance import compare, mean_figures
from quality_cache import add_arguments, factors, open_cache
from results_io import write_result

import calibrate.measure.sensitivity
import calibrate.search.candidates
from calibrate.budget import parse_budget
from calibrate.measure.sensitivity import sensitivities
from calibrate.search.candidates import OFFERED
from calibrate.search.problem import Problem, WithinBudget
from calibrate.settings import KEY_VALUE_FACTORS, QUERY_FACTORS, Job, Settings
from spark3r import Schedule
from spark3r.reference.scenes.seeds import CALIBRATION, EVALUATION
from spark3r.schedule import LengthRule

PROBED, FIRST_CLIP = CALIBRATION[300:308], 5100
POWERS = (1.0, 1.5, 2.0)
FEW = (2, 4), (2, 4, 8, 16, 32)
ALL = QUERY_FACTORS, KEY_VALUE_FACTORS
MEASURED = {"few": (FEW, ()), "between": (FEW, OFFERED), "all": (ALL, OFFERED)}
FIRST = "1, few"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--target-frames", type=int, default=256)
    parser.add_argument("--budgets", type=float, nargs="+", default=[50, 25, 10], metavar="PERCENT")
    default = Path(__file__).with_name("results") / "degradation.json"
    add_arguments(parser, frames=24)
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    cache = open_cache(options)
    folder = stages.folder_of(cache)
    table = stages.latency_table(cache, folder, options.target_frames)
    settings = Settings(parse_budget("50%"), cache=folder / "sensitivities")
    job = Job(cache.model, cache.family, settings, "deviation", lambda *_: None, lambda _: None)
    target = options.target_frames
    found: dict[str, Schedule] = {}
    tables = {}
    for name, ((query_factors, key_value_factors), _) in MEASURED.items():
        with (
            patch.object(calibrate.measure.sensitivity, "QUERY_FACTORS", query_factors),
            patch.object(calibrate.measure.sensitivity, "KEY_VALUE_FACTORS", key_value_factors),
        ):
            tables[name] = sensitivities(job, cache.dense_of(PROBED))
    for percent, power, (name, (_, offered)) in product(options.budgets, POWERS, MEASURED.items()):
        problem = Problem(
            sensitivity=tables[name],
            source="deviation",
            latency=table.model,
            layout=table.layout,
            short=cache.layout,
            length=LengthRule("constant", target, cache.frames, target),
            sensitive=(),
            goal=WithinBudget(stages.budget_ms(table, percent / 100)),
        )
        with (
            patch.object(calibrate.search.candidates, "POWER", power),
            patch.object(calibrate.search.candidates, "OFFERED", offered),
        ):
            schedule = problem.knapsack()
        assert schedule is not None
        found[f"wall + {percent:g} %: {power:g}, {name}"] = schedule
    qualities = cache.complete(EVALUATION[FIRST_CLIP : FIRST_CLIP + options.clips], found)
    means = mean_figures(qualities)
    print(f"{len(qualities)} clips of {cache.frames} frames; power and factors of the knapsack\n")
    columns = ("power, factors", "error, %", "deviation, %", "error ÷ first", "deviation ÷ first")
    print(f"| {' | '.join(columns)} | schedule |\n|{'---|' * 6}")
    rows = []
    for name, schedule in found.items():
        first = f"{name.partition(':')[0]}: {FIRST}"
        ratios = {
            figure: compare(qualities, name, first, figure) for figure in ("error", "deviation")
        }
        error, deviation = (100 * means[name][f"score.{each}"] for each in ratios)
        told = " | ".join(str(each) for each in ratios.values())
        print(f"| {name} | {error:+.1f} | {deviation:.2f} | {told} | {factors(schedule)} |")
        kept = {key: None if each is None else asdict(each) for key, each in ratios.items()}
        rows.append(
            {"name": name, "schedule": factors(schedule), "means": means[name], "ratios": kept}
        )
    document = {"target_frames": target, "clips": len(qualities), "rows": rows}
    write_result(cache.record() | document, options.output)


if __name__ == "__main__":
    main()
