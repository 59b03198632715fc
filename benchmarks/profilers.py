"""Drift against end-to-end probes: do both rank layers and factors alike?

    python benchmarks/profilers.py [--clips 6] [--minutes 5]

Drift needs one dense pass per clip. It is measured on calibration clips and compared with probes
on held-out clips. The agreement of probes on calibration clips with those on held-out clips is an
upper bound. *Scaled* is drift with a slope per layer and axis that is fitted to probes at one
factor on the calibration clips (`fit_drift_to_probes`). The figure is Spearman's rank
correlation over layers, factors and operators, for each axis.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import stages
from quality_cache import OutOfTimeError, QualityCache, add_arguments, open_cache
from results_io import print_markdown, store_json, write_result

from calibrate.defaults import OPERATORS
from calibrate.measure.probe import COLUMNS, probe
from calibrate.measure.residual_drift import drift, fit_drift_to_probes, rank_agreement
from spark3r.reference.scenes.seeds import CALIBRATION, EVALUATION

FIRST_CALIBRATION, FIRST_HELD_OUT = 400, 5000
QUERY_FACTORS, KEY_VALUE_FACTORS = (2, 4, 8), (2, 4, 8, 16)
REQUIRED = 0.8
"""Rank correlation that drift must reach to be the default."""

SCALED_BY = 4  # the factor at which slopes are fitted
METRICS = ("score.deviation", "score.error", "score.consistency")
KEYS = ["operators", "layer", "axis", "factor"]


def tables(cache: QualityCache, folder: Path, seeds: Sequence[int]) -> dict[str, pd.DataFrame]:
    """Return the tables of both profilers, averaged over clips. Each clip is measured once.

    Raises:
        OutOfTimeError: If the deadline passes before everything is measured.
    """
    found: dict[str, list[pd.DataFrame]] = {"drift": [], "probe": []}
    for seed in seeds:
        path = folder / f"{cache.frames}-{seed}.json"
        if not path.exists():
            if time.monotonic() > cache.deadline:
                raise OutOfTimeError
            of_clip = one(cache, seed)
            store_json(path, {name: each.to_numpy().tolist() for name, each in of_clip.items()})
        for name, rows in json.loads(path.read_text()).items():
            found[name].append(pd.DataFrame(rows, columns=list(COLUMNS)))
    return {name: over_clips(each) for name, each in found.items()}


def one(cache: QualityCache, seed: int) -> dict[str, pd.DataFrame]:
    """Return the tables of both profilers on one clip."""
    dense = cache.dense(seed)
    factors: dict[str, Any] = {
        "query_factors": QUERY_FACTORS,
        "key_value_factors": KEY_VALUE_FACTORS,
    }
    probes = probe(cache.runner, dense, OPERATORS, **factors)
    return {
        "drift": drift(cache.runner, dense.clips, OPERATORS, **factors),
        "probe": probes[probes["metric"].isin(METRICS)],
    }


def over_clips(each: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the mean over several clips' tables as one table."""
    whole = pd.concat(each)
    grouped = whole.groupby(["profiler", *KEYS, "metric"], sort=False)["mean"]
    found = grouped.mean().reset_index()
    found["spread"] = grouped.std().fillna(0.0).to_numpy()
    found["clips"] = grouped.count().to_numpy()
    return found[list(COLUMNS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--clips", type=int, default=6, help="calibration clips, and as many held-out ones"
    )
    add_arguments(parser, frames=24, output="profilers.json")
    options = parser.parse_args()
    cache = open_cache(options)
    folder = stages.folder_of(cache) / "profilers"
    folder.mkdir(parents=True, exist_ok=True)
    first = CALIBRATION[FIRST_CALIBRATION : FIRST_CALIBRATION + options.clips]
    second = EVALUATION[FIRST_HELD_OUT : FIRST_HELD_OUT + options.clips]
    try:
        calibration, held_out = (tables(cache, folder, seeds) for seeds in (first, second))
    except OutOfTimeError:
        raise SystemExit("the time is over before all clips are measured: run again") from None
    rows: list[dict[str, Any]] = []
    first_probe = calibration["probe"]
    for metric in METRICS:
        probes = first_probe[first_probe["metric"] == metric]
        few = probes[probes["factor"].isin((1, SCALED_BY))]
        rankings = {
            "drift": calibration["drift"],
            "drift, scaled": fit_drift_to_probes(calibration["drift"], few, metric),
            "probe": probes,
            "probe of deviation": first_probe[first_probe["metric"] == METRICS[0]],
        }
        for name, table in rankings.items():
            for axis, value in rank_agreement(table, held_out["probe"], metric).items():
                rows.append({"profiler": name, "metric": metric, "axis": axis, "spearman": value})
    print(f"{options.clips} and {options.clips} clips of {options.frames} frames\n")
    columns = dict.fromkeys(f"{row['metric']}, {row['axis']}" for row in rows)
    names = dict.fromkeys(row["profiler"] for row in rows)
    print_markdown(
        ("", *columns),
        [
            (name, *(f"{row['spearman']:.2f}" for row in rows if row["profiler"] == name))
            for name in names
        ],
    )
    document = {
        **cache.record(),
        "clips": options.clips,
        "required": REQUIRED,
        "rows": rows,
    }
    write_result(document, options.output)


if __name__ == "__main__":
    main()
