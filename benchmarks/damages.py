"""What the knapsack should add up: damages or their squares, over which factors?

    python benchmarks/damages.py [--clips 48] [--budgets 50 25 10]

The knapsack alone, without a search, under three budgets (wall + so many percent of the way to
dense at the target length; `python benchmarks/calibration.py --only table` times it first), on
clips that nothing was measured on. Compared, clip by clip, with plain sums over the factors that
sensitivities are measured at.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import product
from pathlib import Path
from unittest.mock import patch

import bars
import stages
from measured import add_arguments, bench, factors
from written import write_result

import calibrate.damage
from calibrate.arguments import FRAMES
from calibrate.budget import parse_budget
from calibrate.goal import WithinBudget
from calibrate.problem import Problem
from calibrate.profiling import sensitivities
from calibrate.settings import Job, Settings
from spark3r import Schedule
from spark3r.reference.seeds import CALIBRATION, EVALUATION
from spark3r.schedule import LengthRule

PROBED, FIRST_CLIP = CALIBRATION[300:304], 5100
POWERS = (1.0, 1.5, 2.0)
OFFERED = {"measured": (), "finer": calibrate.damage.OFFERED}
FIRST = "1, measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--target-frames", type=int, default=256)
    parser.add_argument("--budgets", type=float, nargs="+", default=[50, 25, 10], metavar="PERCENT")
    default = Path(__file__).with_name("results") / "damages.json"
    add_arguments(parser, frames=FRAMES)
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    measured = bench(options)
    folder = stages.folder_of(measured)
    table = stages.latency_table(measured, folder, options.target_frames)
    settings = Settings(parse_budget("50%"), cache=folder / "sensitivities")
    job = Job(
        measured.model, measured.family, settings, "deviation", lambda *_: None, lambda _: None
    )
    sensitivity = sensitivities(job, measured.dense_of(PROBED))
    target = options.target_frames
    found: dict[str, Schedule] = {}
    for percent, power, (name, offered) in product(options.budgets, POWERS, OFFERED.items()):
        problem = Problem(
            sensitivity=sensitivity,
            source="deviation",
            latency=table.model,
            layout=table.layout,
            short=measured.layout,
            length=LengthRule("constant", target, measured.frames, target),
            sensitive=(),
            goal=WithinBudget(stages.budget_ms(table, percent / 100)),
        )
        with (
            patch.object(calibrate.damage, "POWER", power),
            patch.object(calibrate.damage, "OFFERED", offered),
        ):
            schedule = problem.knapsack()
        assert schedule is not None
        found[f"wall + {percent:g} %: {power:g}, {name}"] = schedule
    qualities = measured.complete(EVALUATION[FIRST_CLIP : FIRST_CLIP + options.clips], found)
    means = bars.mean_figures(qualities)
    print(
        f"{len(qualities)} clips of {measured.frames} frames; power and factors of the knapsack\n"
    )
    columns = ("power, factors", "error, %", "deviation, %", "error ÷ first", "deviation ÷ first")
    print(f"| {' | '.join(columns)} | schedule |\n|{'---|' * 6}")
    rows = []
    for name, schedule in found.items():
        first = f"{name.partition(':')[0]}: {FIRST}"
        ratios = {
            figure: bars.compare(qualities, name, first, figure)
            for figure in ("error", "deviation")
        }
        error, deviation = (100 * means[name][f"score.{each}"] for each in ratios)
        told = " | ".join(str(each) for each in ratios.values())
        print(f"| {name} | {error:+.1f} | {deviation:.2f} | {told} | {factors(schedule)} |")
        kept = {key: None if each is None else asdict(each) for key, each in ratios.items()}
        rows.append(
            {"name": name, "schedule": factors(schedule), "means": means[name], "ratios": kept}
        )
    document = {"target_frames": target, "clips": len(qualities), "rows": rows}
    write_result(measured.record() | document, options.output)


if __name__ == "__main__":
    main()
