"""Peak memory of every family: dense, dense with the memory saver, and reduced with it.

    python benchmarks/memory.py count --output benchmarks/results/memory.json
    python benchmarks/memory.py measure --output benchmarks/results/memory-measured.json

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
from results_io import write_result
from torch import nn

import spark3r
from spark3r import Operators, QueryMerging, Schedule, load_profile
from spark3r.loading.architecture import load_architecture
from spark3r.memory import peak_extra_mb
from spark3r.memory_count import count_memory

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from family_cases import ALL_CASES, Case, build, images, missing

# Model, profile, and image size after the model's own preprocessing of 4:3 footage.
REAL = {
    "VGGT-1B": ("vggt:random", "vggt-1b", (392, 518)),
    "Pi3": ("pi3:random-pi3", "pi3", (434, 574)),
    "Pi3X": ("pi3:random-pi3x", "pi3x", (434, 574)),
    "DA3-Large": ("da3:random-large", "da3-large", (378, 504)),
    "DA3-Giant": ("da3:random-giant", "da3-giant", (378, 504)),
    "VGGT-Omega-1B": ("omega:random", "vggt-omega-1b", (448, 592)),
}
MODES = ("dense", "saver", "reduced")
PRECISIONS = ("float32", "bfloat16")
REFERENCE = Case("reference", "reference", lambda: spark3r.load_model("reference"), 8, (), 8)
"""The whole reference model. The tests have two of its eight pairs of layers."""


def count_in(
    mode: str, model: nn.Module, schedule: Schedule, frames: int, size: tuple[int, int], dtype: str
) -> float:
    """Return what a pass adds to weights and input, in MB."""
    found = count_memory(
        model,
        frames,
        size,
        schedule=schedule if mode == "reduced" else None,
        dtype=getattr(torch, dtype),
        save_memory=mode != "dense",
        prediction=False,
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
            for dtype in PRECISIONS:
                peaks = {
                    mode: count_in(mode, model, schedule, length, size, dtype) for mode in MODES
                }
                rows.append(
                    {
                        "model": name,
                        "profile": profile,
                        "frames": length,
                        "image": size,
                        "dtype": dtype,
                        "weights_mb": round(weights, 1),
                        "peak_mb": peaks,
                    }
                )
                print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def measure(lengths: list[int], only: str | None) -> list[dict[str, Any]]:
    """Return measured and counted peaks of the reference model and the tests' small models."""
    rows = []
    for case in (REFERENCE, *ALL_CASES[1:]):
        if missing(case) or only not in (None, case.name):
            continue
        for frames in lengths:
            # With one mapping per large tensor a process returns freed memory at once.
            command = [sys.executable, __file__, "one", "--case", case.name]
            settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            row: dict[str, Any] = {"model": case.name, "frames": frames, "peak_mb": {}}
            for mode in MODES:
                printed = subprocess.run(
                    [*command, "--frames", str(frames), "--mode", mode],
                    env=settings,
                    check=True,
                    stdout=subprocess.PIPE,
                ).stdout
                row["peak_mb"][mode] = json.loads(printed.splitlines()[-1])
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    return rows


def one(name: str, frames: int, mode: str) -> dict[str, float | None]:
    """Return the measured and the counted peak of one small model in one mode, in MB."""
    case = next(case for case in (REFERENCE, *ALL_CASES[1:]) if case.name == name)
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
        "counted": count_in(mode, model, reduced, frames, size, "float32"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "what", choices=("count", "measure", "one"), help="one: a single case, used by measure"
    )
    parser.add_argument(
        "--frames", type=int, nargs="+", help="lengths (default: 100; to measure: 64 and 256)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write; by default it is printed")
    parser.add_argument(
        "--models", nargs="+", choices=REAL, default=list(REAL), help="to count (default: all)"
    )
    parser.add_argument(
        "--case", help="the only small instance to measure, by its name in the tests"
    )
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # warnings of upstream code
    torch.set_num_threads(1)
    if arguments.what == "one":
        print(json.dumps(one(arguments.case, arguments.frames[0], arguments.mode)))
        return
    if arguments.what == "count":
        rows = count(arguments.models, arguments.frames or [100])
    else:
        rows = measure(arguments.frames or [64, 256], arguments.case)
    write_result({"what": arguments.what, "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
