"""What the knapsack should sum: degradations or a power of them, at which factors.

    python benchmarks/degradation.py [--clips 48] [--budgets 50 25 10]

This script runs the knapsack without a search under three budgets, each a percentage of the way
from the wall to dense at the target length (`python benchmarks/calibration.py --only table` times
it first). The schedules run on clips on which nothing was measured before. Sensitivities come from
*few* factors (powers of two up to 4 for queries and 32 for keys and values), from few factors with
the factors *between* them interpolated linearly in the logarithm of the factor, or from *all*
factors that `calibrate` measures. Every variant is compared by clip with plain sums over few.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from itertools import product

import stages
from calibration_acceptance import compare, mean_figures
from quality_cache import add_arguments, factors, open_cache
from results_io import print_markdown, write_result

from calibrate.defaults import KEY_VALUE_FACTORS, OFFERED, OPERATORS, QUERY_FACTORS
from calibrate.search.candidates import choices
from calibrate.search.problem import LatencyLimit, Space
from spark3r import LengthRule, Schedule
from spark3r.reference.scenes.seeds import CALIBRATION, EVALUATION

PROBED, FIRST_CLIP = CALIBRATION[300:308], 5100
POWERS = (1.0, 1.5, 2.0)
FEW = (2, 4), (2, 4, 8, 16, 32)
ALL = QUERY_FACTORS, KEY_VALUE_FACTORS
MEASURED = {"few": (FEW, ()), "between": (FEW, OFFERED), "all": (ALL, OFFERED)}
FIRST = "1, few"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=48, help="held-out clips (default: 48)")
    stages.add_target_frames(parser)
    stages.add_budgets(parser, [50, 25, 10])
    add_arguments(parser, frames=24, output="degradation.json")
    options = parser.parse_args()
    cache = open_cache(options)
    table = stages.latency_table(cache, stages.folder_of(cache), options.target_frames)
    target = options.target_frames
    found: dict[str, Schedule] = {}
    tables = {}
    for name, ((query_factors, key_value_factors), _) in MEASURED.items():
        tables[name] = stages.sensitivity_table(
            cache, "deviation", PROBED, query_factors, key_value_factors
        )
    for percent, power, (name, (_, offered)) in product(options.budgets, POWERS, MEASURED.items()):
        layers = choices(
            tables[name], OPERATORS, table.model, table.layout, offered=offered, power=power
        )
        length = LengthRule("constant", target, cache.frames, target)
        space = Space(layers, OPERATORS, length, table.model.wall_ms(table.layout))
        goal = LatencyLimit(stages.budget_ms(table, percent / 100))
        schedule = goal.proposed(space, {})
        assert schedule is not None
        found[f"wall + {percent:g} %: {power:g}, {name}"] = schedule
    qualities = cache.complete(EVALUATION[FIRST_CLIP : FIRST_CLIP + options.clips], found)
    means = mean_figures(qualities)
    print(f"{len(qualities)} clips of {cache.frames} frames; power and factors of the knapsack\n")
    rows, lines = [], []
    for name, schedule in found.items():
        first = f"{name.partition(':')[0]}: {FIRST}"
        ratios = {
            figure: compare(qualities, name, first, figure) for figure in ("error", "deviation")
        }
        error, deviation = (100 * means[name][f"score.{each}"] for each in ratios)
        figures = (f"{error:+.1f}", f"{deviation:.2f}", *ratios.values(), factors(schedule))
        lines.append((name, *figures))
        kept = {key: None if each is None else asdict(each) for key, each in ratios.items()}
        rows.append(
            {"name": name, "schedule": factors(schedule), "means": means[name], "ratios": kept}
        )
    columns = ("power, factors", "error, %", "deviation, %", "error ÷ first", "deviation ÷ first")
    print_markdown((*columns, "schedule"), lines)
    document = {"target_frames": target, "clips": len(qualities), "rows": rows}
    write_result(cache.record() | document, options.output)


if __name__ == "__main__":
    main()
