"""Whether a search finds better schedules than the knapsack, on clips that nothing was chosen on.

    python benchmarks/search_gain.py [--clips 48] [--minutes 10]

The first part takes the six cases of `benchmarks/calibration.py` (two sources, three budgets) from
its results, and runs the best schedule of the search and that of the knapsack. The second takes the
knapsack's schedule at the tightest budget, and changes in all layers what the knapsack cannot
choose: the size of the groups of merged queries, the anchor, the mass that is restored. The gain
of the best of them is about what a search over these could gain. Latency is not compared. The
schedules were found on clips of 48 frames, and shorter ones would run dense.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quality_cache import OutOfTimeError, QualityCache, add_arguments, open_cache
from results_io import print_markdown, write_result

from calibrate.measure.quality import Quality
from calibrate.measure.score import LEAST_DEVIATION, score
from calibrate.measure.statistics import PairedRatio, paired_ratio
from calibrate.search.storage import decode
from spark3r import Schedule
from spark3r.reduction.operators import KEY_VALUE_OPERATORS, Operators, QueryMerging
from spark3r.reference.scenes.seeds import EVALUATION

RESULTS = Path(__file__).parent / "results" / "calibration.json"

FIRST_CLIP = 3500  # among the evaluation seeds, beyond those of `benchmarks/calibration.py`


def changed(schedule: Schedule, **change: Any) -> Schedule:
    """Return a schedule whose operators all have another group size, anchor or mass."""

    def other(operators: Operators) -> Operators:
        query = {name: value for name, value in change.items() if hasattr(operators.query, name)}
        key_value = {
            name: value for name, value in change.items() if hasattr(operators.key_value, name)
        }
        return replace(
            operators,
            query=replace(operators.query, **query),
            key_value=replace(operators.key_value, **key_value),
        )

    layers = tuple(
        rule if rule.operators is None else replace(rule, operators=other(rule.operators))
        for rule in schedule.layers
    )
    return replace(schedule, layers=layers, operators=other(schedule.operators))


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "groups of 5 frames": {"group": 5},
    "groups of 10 frames": {"group": 10},
    "groups of 40 frames": {"group": 40},
    "anchor thinned": {"keep_anchor": False},
    "anchor not merged": {"merge_anchor": False},
    "half of the mass": {"mass_correction": 0.5},
}
"""What the knapsack cannot choose, and is the same in all of its schedules."""


def ratio(ours: Sequence[Quality], others: Sequence[Quality]) -> PairedRatio:
    """Return the deviation of runs ÷ that of other runs on the same clips."""

    def scores(qualities: Sequence[Quality]) -> dict[str, float]:
        return {each.clip: score(each, each, "deviation") for each in qualities}

    return paired_ratio(scores(ours), scores(others), tolerance=LEAST_DEVIATION)


def stored(document: Mapping[str, Any]) -> Schedule:
    """Return a schedule of the results, whose operators were written in an earlier form."""

    def nested(flat: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if flat is None or not isinstance(flat["query"], str):
            return None if flat is None else dict(flat)
        query = QueryMerging(flat["group"], flat["merge_anchor"], flat["unmerge"])
        kind = KEY_VALUE_OPERATORS[flat["key_value"]]
        fields = {name: flat[name] for name in ("keep_special", "keep_anchor", "mass_correction")}
        return Operators(query, kind(**fields)).to_dict()

    layers = [{**rule, "operators": nested(rule["operators"])} for rule in document["layers"]]
    return decode({**document, "layers": layers, "operators": nested(document["operators"])})


def pairs_of(document: Mapping[str, Any]) -> dict[str, tuple[Schedule, Schedule]]:
    """Return schedules to compare by name: the search's or a variant, and the knapsack's."""
    found = {}
    for each in document["searches"]:
        ours, knapsack = (
            stored(each["finalists"][kind]["schedule"]) for kind in ("search", "knapsack")
        )
        found[f"{each['mode']}, wall + {each['share']:.0%}: search"] = (ours, knapsack)
    tightest = min(document["searches"], key=lambda each: (each["share"], each["mode"]))
    knapsack = stored(tightest["finalists"]["knapsack"]["schedule"])
    for name, change in VARIANTS.items():
        found[f"wall + {tightest['share']:.0%}: {name}"] = (changed(knapsack, **change), knapsack)
    return found


def run(cache: QualityCache, clips: int) -> list[dict[str, Any]]:
    """Return the ratio of deviations of each comparison, and print them."""
    pairs = pairs_of(json.loads(RESULTS.read_text()))
    schedules = {
        str(number): each for number, pair in enumerate(pairs.values()) for each in pair[:1]
    }
    schedules |= {f"{number} knapsack": pair[1] for number, pair in enumerate(pairs.values())}
    seeds = EVALUATION[FIRST_CLIP : FIRST_CLIP + clips]
    runs = cache.complete(seeds, schedules)
    if len(runs) < clips:
        raise OutOfTimeError
    rows = []
    for number, name in enumerate(pairs):
        ours = [each[str(number)] for each in runs.values()]
        found = ratio(ours, [each[f"{number} knapsack"] for each in runs.values()])
        rows.append({"name": name, "ratio": found.ratio, "low": found.low, "high": found.high})
    print_markdown(
        ("schedule", "deviation ÷ that of the knapsack"),
        [
            [row["name"], f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"]
            for row in rows
        ],
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=48, help="held-out clips (default: 48)")
    add_arguments(parser, frames=48, output="search_gain.json")
    options = parser.parse_args()
    cache = open_cache(options)
    try:
        rows = run(cache, options.clips)
    except OutOfTimeError:
        raise SystemExit("the time is over before all clips have run: run again") from None
    document = {**cache.record(), "clips": options.clips, "rows": rows}
    write_result(document, options.output)


if __name__ == "__main__":
    main()
