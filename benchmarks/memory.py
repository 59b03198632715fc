"""Peak memory of every family: dense, with the memory saver, reduced, and as predictions run.

    python benchmarks/memory.py --output benchmarks/results/memory.json    # both of these:
    python benchmarks/memory.py count
    python benchmarks/memory.py measure

`count` counts the real architectures at their real size with `spark3r.memory_count`, which runs
them on shapes alone. `measure` runs small models on the CPU in float32, reads the peak memory of
the process, and counts the same pass. It shows how accurate a count is.

Upstream code is found as in the tests, whose small instances are measured: on the import path or in
the folders that SPARK3R_UPSTREAM names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from results_io import print_markdown, write_result
from torch import nn

import spark3r
from spark3r import Operators, QueryMerging, Schedule, load_profile
from spark3r.loading.architecture import load_architecture
from spark3r.memory import peak_extra_mb
from spark3r.memory_count import count_memory

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from family_cases import ALL_CASES, Case, build, images, missing

# Model, profile, and image size after the model's own preprocessing of 4:3 footage; PanoVGGT's of
# panoramas.
REAL = {
    "VGGT-1B": ("vggt:random", "vggt-1b", (392, 518)),
    "Pi3": ("pi3:random-pi3", "pi3", (434, 574)),
    "Pi3X": ("pi3:random-pi3x", "pi3x", (434, 574)),
    "DA3-Large": ("da3:random-large", "da3-large", (378, 504)),
    "DA3-Giant": ("da3:random-giant", "da3-giant", (378, 504)),
    "VGGT-Omega-1B": ("omega:random", "vggt-omega-1b", (448, 592)),
    "MapAnything": ("mapanything:random-v1.1", "map-anything", (392, 518)),
    "WorldMirror-2": ("worldmirror:random-2", "worldmirror-2", (392, 518)),
    "PanoVGGT": ("panovggt:random", "panovggt", (518, 1036)),
}
MODES = ("dense", "saver", "reduced")
PREDICTION = "prediction"
"""A reduced pass without what no Prediction reads."""
REFERENCE = Case("reference", "reference", lambda: spark3r.load_model("reference"), 8, (), 8)
"""The whole reference model. The tests have two of its eight pairs of layers."""
MEASURED = {"reference": (64, 256), "vggt-stand-in": (256,), "da3-small-upstream": (48,)}
"""Frames of the small models that are measured."""


def count_in(
    mode: str, model: nn.Module, schedule: Schedule, frames: int, size: tuple[int, int]
) -> float:
    """Return what a pass in float32 adds to weights and input, in MB."""
    found = count_memory(
        model,
        frames,
        size,
        schedule=schedule if mode in ("reduced", PREDICTION) else None,
        save_memory=mode != "dense",
        prediction=mode == PREDICTION,
    )
    return round(found.extra / 1e6, 1)


def count(models: list[str], frames: list[int]) -> list[dict[str, Any]]:
    """Return counted peaks of real architectures at several lengths."""
    rows = []
    for name in models:
        source, profile, size = REAL[name]
        model, schedule = load_architecture(source), load_profile(profile).schedule()
        weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
        for length in frames:
            peaks = {
                mode: count_in(mode, model, schedule, length, size) for mode in (*MODES, PREDICTION)
            }
            rows.append(
                {
                    "model": name,
                    "profile": profile,
                    "frames": length,
                    "image": size,
                    "dtype": "float32",
                    "weights_mb": round(weights, 1),
                    "peak_mb": peaks,
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def measure() -> list[dict[str, Any]]:
    """Return measured and counted peaks of the reference model and the tests' small models."""
    rows = []
    for name, lengths in MEASURED.items():
        if missing(case_of(name)):
            print(f"{name}: its code is not installed", file=sys.stderr)
            continue
        for frames in lengths:
            row: dict[str, Any] = {"model": name, "frames": frames, "peak_mb": {}}
            for mode in MODES:
                # With one mapping per large tensor a process returns freed memory at once.
                printed = subprocess.run(
                    [sys.executable, __file__, "one", name, str(frames), mode],
                    env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
                    check=True,
                    stdout=subprocess.PIPE,
                ).stdout
                row["peak_mb"][mode] = json.loads(printed.splitlines()[-1])
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    return rows


def case_of(name: str) -> Case:
    """Return a small model by its name in the tests. The reference model is whole."""
    return next(case for case in (REFERENCE, *ALL_CASES[1:]) if case.name == name)


def one(name: str, frames: int, mode: str) -> dict[str, float | None]:
    """Return the measured and the counted peak of one small model in one mode, in MB."""
    case = case_of(name)
    model, clip = build(case), images(case, frames, rows=8, columns=8)
    reduced = Schedule.uniform(case.layers, 2, 4, operators=Operators(QueryMerging(group=20)))
    # Dense has a schedule of factors 1, because upstream's rotary embedding reads values.
    schedule = reduced if mode == "reduced" else Schedule.dense(case.layers)
    warm_up = images(case, 17, rows=2, columns=2)
    with spark3r.apply(model, schedule, save_memory=mode != "dense"), torch.no_grad():
        model(warm_up)
        measured = peak_extra_mb(lambda: model(clip))
    size = (clip.shape[3], clip.shape[4])
    return {
        "measured": None if measured is None else round(measured, 1),
        "counted": count_in(mode, model, reduced, frames, size),
    }


def print_counts(rows: list[dict[str, Any]]) -> None:
    """Print the counts as a Markdown table, in GB."""
    columns = ("model", "frames", "image", "weights", *MODES, PREDICTION)
    cells = [
        (
            row["model"],
            row["frames"],
            "{1}×{0}".format(*row["image"]),
            *(f"{mb / 1000:.1f}" for mb in (row["weights_mb"], *row["peak_mb"].values())),
        )
        for row in rows
    ]
    print_markdown(columns, cells)


def main() -> None:
    warnings.simplefilter("ignore")  # warnings of upstream code
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["one"]:  # a single case in a process of its own, for `measure`
        name, frames, mode = sys.argv[2:]
        print(json.dumps(one(name, int(frames), mode)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="?", choices=("count", "measure"), help="default: both")
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[100], help="lengths to count (default: 100)"
    )
    parser.add_argument(
        "--models", nargs="+", choices=REAL, default=list(REAL), help="to count (default: all)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write; by default it is printed")
    options = parser.parse_args()
    document: dict[str, Any] = {}
    if options.what != "measure":
        try:
            document["counted"] = count(options.models, options.frames)
        except spark3r.FamilyError as error:
            parser.error(str(error))
        print_counts(document["counted"])
    if options.what != "count":
        document["measured"] = measure()
    write_result(document, options.output)


if __name__ == "__main__":
    main()
