"""Speed at scale: the committed figures and their acceptance criteria.

    python benchmarks/scale.py reference    # about 6 minutes on two cores
    python benchmarks/scale.py da3          # about 6 minutes; needs depth-anything-3
    python benchmarks/scale.py peer         # about 4 minutes
    python benchmarks/scale.py deviation    # about 15 minutes
    python benchmarks/scale.py report       # tables, plot and criteria from the committed data

``reference`` and ``da3`` run `spark3r.benchmark.bench` on the reference model and on the code of
Depth-Anything-3 small with random weights. ``peer`` times our most faithful schedule in turns with
FastVGGT's merging. ``deviation`` compares our schedules with it on rendered clips, by distance from
dense and by error. Each writes a JSON file to `benchmarks/results/` and prints whether its
acceptance criteria are met. `benchmarks/gpu.py` measures real sizes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A thread that waits busily distorts the times of everything that runs beside it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from acceptance import print_criteria
from allocator import keep_freed_memory
from operators import mean_and_error, relative_error
from results_io import RESULTS, write_result
from scale_acceptance import (
    DA3_SCHEDULE,
    OURS,
    PEER,
    da3_criteria,
    peer_criteria,
    reference_criteria,
)

from spark3r import Prediction, load_model
from spark3r.benchmark.api import bench
from spark3r.benchmark.breakdown import PARTS
from spark3r.benchmark.result import COLUMNS, Row, cells, part_cells
from spark3r.benchmark.treatments import treatments
from spark3r.cli.tables import print_table
from spark3r.identity import fingerprint
from spark3r.metrics import log_depth_deviation, pose_metrics
from spark3r.reference.scenes.render import rendered_clip
from spark3r.reference.scenes.seeds import CALIBRATION
from spark3r.runner import Runner

REFERENCE_FRAMES = (128, 256, 512, 1024)
REFERENCE_SCHEDULES = ("dense", "wall", "paper", OURS, PEER)
DA3_FRAMES = (64, 128)
DA3_SCHEDULES = ("dense", "wall", DA3_SCHEDULE)
DA3_GRID = (8, 10)
"""Patches per frame, 112x140 pixels. There are about as many tokens per frame as in the reference
model, so that 128 frames run in seconds. With fewer tokens per frame global attention has a smaller
share of the time, and the criterion is harder to meet."""
DEVIATION_CLIPS = {128: 6, 256: 6, 512: 2, 1024: 2}
DEVIATION_SCHEDULES = ("paper", OURS, PEER)


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def path_of(name: str) -> Path:
    return RESULTS / f"scale_{name}.json"


def read(name: str) -> dict[str, Any] | None:
    path = path_of(name)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def rows_of(record: dict[str, Any]) -> list[Row]:
    return [Row(**row) for row in record["rows"]]


def reference(arguments: argparse.Namespace) -> None:
    frames = arguments.frames or REFERENCE_FRAMES
    result = bench(
        load_model("reference"),
        frames,
        arguments.schedules or REFERENCE_SCHEDULES,
        name="reference",
        dense_up_to=512,
        once_from=512,
        rounds=arguments.rounds,
        cpu_time=arguments.cpu_time,
        progress=progress,
    )
    write_result(result.to_dict(), path_of(arguments.name))
    print_rows(list(result.rows))
    print_criteria(reference_criteria(list(result.rows)))


def peer(arguments: argparse.Namespace) -> None:
    result = bench(
        load_model("reference"),
        arguments.frames or REFERENCE_FRAMES,
        (OURS, PEER),
        name="reference",
        rounds=arguments.rounds,
        cpu_time=arguments.cpu_time,
        progress=progress,
    )
    write_result(result.to_dict(), path_of("peer"))
    print_rows(list(result.rows))


def da3(arguments: argparse.Namespace) -> None:
    result = bench(
        load_model("da3:random-small"),
        arguments.frames or DA3_FRAMES,
        DA3_SCHEDULES,
        name="da3:random-small",
        grid=DA3_GRID,
        rounds=arguments.rounds,
        cpu_time=arguments.cpu_time,
        progress=progress,
    )
    write_result(result.to_dict(), path_of("da3"))
    print_rows(list(result.rows))
    print_criteria(da3_criteria(list(result.rows)))


def deviation(arguments: argparse.Namespace) -> None:
    runner = Runner.of(load_model("reference"))
    chosen = treatments(("dense", *DEVIATION_SCHEDULES), runner)
    rows = []
    for frames in arguments.frames or DEVIATION_CLIPS:
        count = arguments.clips or DEVIATION_CLIPS.get(frames, 6)
        clips = [rendered_clip(seed, frames) for seed in CALIBRATION[:count]]
        runs: dict[str, list[Prediction]] = {}
        for name, apply in chosen.items():
            progress(f"{frames} frames, {name}")
            with apply():
                runs[name] = [runner.predict(clip) for clip in clips]
        for name in DEVIATION_SCHEDULES:
            pairs = list(zip(runs[name], runs["dense"], clips, strict=True))
            depth = [log_depth_deviation(r.depth, d.depth) for r, d, _ in pairs]
            rotation = [pose_metrics(r.extrinsics, d.extrinsics).rotation_deg for r, d, _ in pairs]
            error = [relative_error(*pair) for pair in pairs]
            rows.append(
                {
                    "frames": frames,
                    "clips": count,
                    "schedule": name,
                    "log_depth": mean_and_error(depth),
                    "rotation_deg": mean_and_error(rotation),
                    "log_error_ratio": mean_and_error(error),
                    "log_depth_minus_peer": mean_and_error(
                        [
                            a - log_depth_deviation(p.depth, d.depth)
                            for a, p, d in zip(depth, runs[PEER], runs["dense"], strict=True)
                        ]
                    ),
                }
            )
    record = {"fingerprint": fingerprint(runner.attention), "rows": rows}
    write_result(record, path_of("deviation"))
    print_deviation(record)


def print_deviation(record: dict[str, Any]) -> None:
    """Print the distance of each schedule from dense, beside that of the peer."""
    columns = ("frames", "clips", "schedule", "log depth %", f"minus {PEER}'s", "rotation deg")
    print_table(
        (*columns, "error vs dense %"),
        [
            [
                str(row["frames"]),
                str(row["clips"]),
                row["schedule"],
                "{:.2f} ± {:.2f}".format(*(100 * value for value in row["log_depth"])),
                "{:+.2f} ± {:.2f}".format(*(100 * value for value in row["log_depth_minus_peer"])),
                "{:.2f} ± {:.2f}".format(*row["rotation_deg"]),
                f"{100 * math.expm1(row['log_error_ratio'][0]):+.1f} ± "
                f"{100 * row['log_error_ratio'][1]:.1f}",
            ]
            for row in record["rows"]
        ],
    )


def print_rows(rows: Sequence[Row]) -> None:
    print_table(COLUMNS, [cells(row) for row in rows])
    print("\nmilliseconds by part, in a pass of its own:\n")
    measured = [part_cells(row) for row in rows if row.parts_ms is not None]
    print_table(("frames", "schedule", *PARTS), measured)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw time over length on logarithmic axes, with the slope of linear growth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.2), constrained_layout=True)
    lengths = sorted({row.frames for row in rows})
    for name in dict.fromkeys(row.schedule for row in rows):
        chosen = [row for row in rows if row.schedule == name]
        x, y = [row.frames for row in chosen], [row.ms / 1000 for row in chosen]
        (line,) = axes.plot(x, y, marker="o", label=name)
        guessed = [(row.frames, row.ms / 1000) for row in chosen if row.modelled]
        if guessed:
            axes.plot(
                *zip(*guessed, strict=True),
                marker="o",
                color=line.get_color(),
                markerfacecolor="white",
                linestyle="none",
                label=f"{name}, modelled",
            )
    wall = [row for row in rows if row.schedule == "wall"]
    if wall:
        start = wall[0].ms / 1000 / wall[0].frames
        axes.plot(
            lengths,
            [0.8 * start * n for n in lengths],
            color="grey",
            linestyle=":",
            label="linear growth",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xlabel("frames")
    axes.set_ylabel("seconds per clip")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def report(arguments: argparse.Namespace) -> None:
    found = {name: read(name) for name in ("reference", "da3", "deviation")}
    for name, criteria_of in (("reference", reference_criteria), ("da3", da3_criteria)):
        record = found[name]
        if record is not None:
            rows = rows_of(record)
            print(f"\n{record['model']} on {record['device']}, {record['date']}\n")
            print_rows(rows)
            print_criteria(criteria_of(rows))
    if found["deviation"] is not None:
        print()
        print_deviation(found["deviation"])
        timed = [record for record in (read("peer"), found["reference"]) if record is not None]
        print_criteria(peer_criteria([rows_of(each) for each in timed], found["deviation"]["rows"]))
    if found["reference"] is not None:
        plot(rows_of(found["reference"]), RESULTS / "scale_reference.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measurements = {
        "reference": reference,
        "da3": da3,
        "peer": peer,
        "deviation": deviation,
        "report": report,
    }
    parser.add_argument("what", choices=measurements)
    parser.add_argument("--frames", type=int, nargs="+", help="other lengths than the default ones")
    parser.add_argument(
        "--rounds", type=int, default=3, help="samples of each schedule (default: 3)"
    )
    counts = ", ".join(f"{count} of {frames}" for frames, count in DEVIATION_CLIPS.items())
    parser.add_argument("--clips", type=int, help=f"with deviation (default: {counts} frames)")
    parser.add_argument("--cpu-time", action="store_true", help="as for spark3r bench")
    parser.add_argument("--name", default="reference", help="with reference: name of the result")
    parser.add_argument("--schedules", nargs="+", help="with reference: schedules")
    arguments = parser.parse_args()
    keep_freed_memory()
    measurements[arguments.what](arguments)


if __name__ == "__main__":
    main()
