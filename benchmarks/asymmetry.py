"""Queries against keys and values: Figures 1 and 5 of the Spark3R paper on the reference model.

    python benchmarks/asymmetry.py --clips 24 --frames 48

This script runs the reference model on held-out clips under uniform schedules (queries merged,
keys and values pruned, or both, with the paper's operators and with ours) and under schedules that
reduce a single layer. It prints tables and writes `asymmetry.json` and `asymmetry.png`. Errors are
measured against ground truth on 8 key frames, and deviations against the dense run. ± is the
standard error of the paired difference to dense.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import NullLocator
from results_io import RESULTS, write_result
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import spark3r
from spark3r import LayerRule, Operators, QueryMerging, Schedule
from spark3r.benchmark.treatments import THINNED
from spark3r.families.registry import detect
from spark3r.geometry import decode_pose
from spark3r.identity import fingerprint
from spark3r.metrics import log_depth_deviation, relative_pose_errors
from spark3r.reference import ReferenceModel, load
from spark3r.reference.scenes.seeds import EVALUATION
from training.evaluate import evaluation_clip, path_times, score, select

FACTORS = (2, 3, 4, 8, 16, 32)
FIRST_CLIP = 1000  # among the evaluation seeds, beyond the scenes that training.evaluate uses
PAPER = Operators()
IN_FRAME = Operators(QueryMerging(group=1))
SERIES = {
    "queries, groups of 20 frames": ("query", PAPER),
    "keys and values, whole frames": ("key_value", PAPER),
    "both": ("both", PAPER),
    "keys and values, token stride with mass correction": ("key_value", THINNED),
    "queries, inside a frame": ("query", IN_FRAME),
}
LAYER_SERIES = {"key_value 16": (1, 16), "key_value frame 0 only": (1, 10_000), "query 4": (4, 1)}
ERRORS = ("rotation_deg", "translation_deg", "auc_30", "abs_rel_aligned")


@dataclass(frozen=True)
class Run:
    """Result of one schedule on one clip."""

    seconds: float
    rotation_deg: float
    translation_deg: float
    auc_30: float
    abs_rel_aligned: float
    deviation_log_depth: float
    deviation_rotation_deg: float


@contextmanager
def isolated(model: ReferenceModel) -> Iterator[None]:
    """Restrict every global layer to attention inside frames."""
    tokens = 5 + 64

    def forward(attention: Any, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        alone = x.reshape(-1, tokens, x.shape[2])
        own = (rope[0][:tokens], rope[1][:tokens])
        return type(attention).forward(attention, alone, own).reshape(x.shape)

    layers: list[Any] = [block.attn for block in model.aggregator.global_blocks]
    for layer in layers:
        layer.forward = MethodType(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def schedules(layers: int, frames: int) -> dict[str, Schedule]:
    """Return every schedule except dense, by name."""
    found = {}
    for series, (axis, operators) in SERIES.items():
        for factor in FACTORS:
            query = factor if axis in ("query", "both") else 1
            key_value = factor if axis in ("key_value", "both") else 1
            found[f"{series} | {factor}"] = Schedule.uniform(
                layers, query, key_value, operators=operators
            )
    found["frame 0 only"] = Schedule.uniform(layers, 1, frames)
    for series, (query, key_value) in LAYER_SERIES.items():
        for layer in range(layers):
            rules = [LayerRule()] * layers
            rules[layer] = LayerRule(query, min(key_value, frames))
            found[f"layer {series} | {layer}"] = Schedule(tuple(rules))
    return found


@torch.inference_mode()
def run(
    model: ReferenceModel, clip: spark3r.Clip, keys: list[int], dense: dict[str, Tensor] | None
) -> tuple[Run, dict[str, Tensor]]:
    """Run the model in its present state. Deviations are 0 if `dense` is None."""
    start = time.perf_counter()
    output = model(clip.images)
    seconds = time.perf_counter() - start
    extrinsics, _ = decode_pose(output["pose_enc"][0], (64, 64))
    depth = output["depth"][0, ..., 0]
    kept = {"depth": depth, "extrinsics": extrinsics}
    scores = asdict(score(depth[keys], extrinsics[keys], select(clip, keys)))
    log_depth = rotation = 0.0
    if dense:
        log_depth = log_depth_deviation(depth, dense["depth"])
        pairs = relative_pose_errors(extrinsics[keys], dense["extrinsics"][keys])
        rotation = float(pairs.rotation_deg.median())
    errors = {name: scores[name] for name in ERRORS}
    return Run(seconds, **errors, deviation_log_depth=log_depth, deviation_rotation_deg=rotation), (
        kept
    )


def measure_clip(
    model: ReferenceModel, seed: int, frames: int, cache: Path | None
) -> dict[str, Run]:
    """Return the results of every schedule on one clip."""
    todo = schedules(len(model.aggregator.global_blocks), frames)
    _, keys = path_times(frames)
    clip = evaluation_clip(seed, frames, cache)
    with torch.inference_mode():
        model(clip.images)  # warm-up
    reference, dense = run(model, clip, keys, None)
    runs = {"dense": reference}
    for name, schedule in todo.items():
        with spark3r.apply(model, schedule):
            runs[name] = run(model, clip, keys, dense)[0]
    with isolated(model):
        runs["own frame only"] = run(model, clip, keys, dense)[0]
    return runs


def weights_of(model: ReferenceModel) -> str:
    """Return the first digits of the fingerprint of the model's global attention."""
    return str(fingerprint(detect(model).attention(model)))[:12]


def measure(model: ReferenceModel, options: argparse.Namespace) -> dict[str, list[Run]]:
    """Return the results of every schedule, one per clip. Finished clips do not run again."""
    runs: dict[str, list[Run]] = {}
    folder = options.runs / weights_of(model)
    begin = time.monotonic()
    first = FIRST_CLIP + options.skip
    seeds = EVALUATION[first : first + options.clips]
    for seed in track(seeds, description="clips", console=Console(stderr=True)):
        kept = folder / f"{options.frames}-{seed}.json"
        if not kept.exists():
            if time.monotonic() - begin > 60.0 * options.minutes:
                continue
            result = measure_clip(model, seed, options.frames, options.cache)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({name: asdict(row) for name, row in result.items()}))
        for name, row in json.loads(kept.read_text()).items():
            runs.setdefault(name, []).append(Run(**row))
    if not runs:
        raise SystemExit("no clip was finished in the time given")
    return runs


def summarise(runs: dict[str, list[Run]]) -> dict[str, dict[str, float]]:
    """Return means over clips; for errors also the paired difference to dense and its error."""
    summary: dict[str, dict[str, float]] = {}
    for name, rows in runs.items():
        entry: dict[str, float] = {"seconds": statistics.median(row.seconds for row in rows)}
        for field in (*ERRORS, "deviation_log_depth", "deviation_rotation_deg"):
            values = [getattr(row, field) for row in rows]
            entry[field] = statistics.fmean(values)
            if field in ERRORS:
                pairs = zip(values, runs["dense"], strict=True)
                gaps = [value - getattr(base, field) for value, base in pairs]
                entry[f"{field}_change"] = statistics.fmean(gaps)
                spread = statistics.stdev(gaps) if len(gaps) > 1 else math.nan
                entry[f"{field}_change_se"] = spread / math.sqrt(len(gaps))
        summary[name] = entry
    return summary


def show(summary: dict[str, dict[str, float]], clips: int, frames: int) -> None:
    """Print the tables."""
    table = Table(title=f"{clips} held-out clips of {frames} frames")
    columns = ("rotation °", "transl. °", "AUC@30", "AbsRel al.", "dev. log d", "dev. rot °", "ms")
    table.add_column("schedule | factor or layer", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in summary.items():
        table.add_row(
            name,
            f"{row['rotation_deg']:.2f} ({row['rotation_deg_change']:+.2f})",
            f"{row['translation_deg']:.1f}",
            f"{row['auc_30']:.3f} ({row['auc_30_change']:+.3f}±{row['auc_30_change_se']:.3f})",
            f"{row['abs_rel_aligned']:.4f}",
            f"{row['deviation_log_depth']:.4f}",
            f"{row['deviation_rotation_deg']:.2f}",
            f"{1000 * row['seconds']:.0f}",
        )
    Console(width=150).print(table)


def show_equal_latency(summary: dict[str, dict[str, float]]) -> None:
    """Print every series at the latencies of merged queries, interpolated between factors."""
    table = Table(title="at equal latency")
    table.add_column("ms per clip of merging queries")
    for series in SERIES:
        table.add_column(f"{series}: AUC@30, rotation °", justify="right")
    for factor in FACTORS:
        wanted = summary[f"{next(iter(SERIES))} | {factor}"]["seconds"]
        cells = [f"{1000 * wanted:.0f} (r = {factor})"]
        for series in SERIES:
            points = [summary["dense"], *(summary[f"{series} | {each}"] for each in FACTORS)]
            points.sort(key=lambda point: point["seconds"])
            seconds = [point["seconds"] for point in points]
            if not seconds[0] <= wanted <= seconds[-1]:
                cells.append("not reached")
                continue
            auc, rotation = (
                np.interp(wanted, seconds, [point[field] for point in points])
                for field in ("auc_30", "rotation_deg")
            )
            cells.append(f"{auc:.3f}, {rotation:.2f}")
        table.add_row(*cells)
    Console(width=150).print(table)


def plot(summary: dict[str, dict[str, float]], path: Path, frames: int) -> None:
    """Draw errors and deviations over factor and latency, and the sensitivity of each layer.

    Error bars are the standard error of the paired change against dense.
    """
    figure, axes = plt.subplots(2, 3, figsize=(16, 8.5))
    rows = (("auc_30", "AUC@30 (higher is better)"), ("rotation_deg", "rotation error, degrees"))
    dense = summary["dense"]
    for axis, (field, label) in zip(axes[:, 0], rows, strict=True):
        for series in SERIES:
            entries = [dense, *(summary[f"{series} | {factor}"] for factor in FACTORS)]
            axis.errorbar(
                (1, *FACTORS),
                [entry[field] for entry in entries],
                [entry[f"{field}_change_se"] for entry in entries],
                marker="o",
                capsize=2,
                label=series,
            )
        axis.set(xscale="log", xlabel="factor", ylabel=label)
        axis.set_xticks((1, *FACTORS), [str(factor) for factor in (1, *FACTORS)])
    for series in SERIES:
        entries = [summary[f"{series} | {factor}"] for factor in FACTORS]
        axes[0, 1].plot(FACTORS, [e["deviation_log_depth"] for e in entries], marker="o")
        times = [1000 * e["seconds"] for e in (dense, *entries)]
        axes[1, 1].plot(times, [e["auc_30"] for e in (dense, *entries)], marker="o")
    axes[0, 1].set(xscale="log", yscale="log", xlabel="factor", ylabel="deviation of log depth")
    axes[0, 1].set_xticks(FACTORS, [str(factor) for factor in FACTORS])
    for axis in (axes[0, 0], axes[1, 0], axes[0, 1]):
        axis.xaxis.set_minor_locator(NullLocator())
    axes[1, 1].set(xlabel="latency, ms", ylabel="AUC@30")
    axes[0, 0].legend(fontsize=7)
    names = [name for name in summary if name.startswith("layer ")]
    layers = len(names) // len(LAYER_SERIES)
    deviations = (
        ("deviation_log_depth", "deviation of log depth"),
        ("deviation_rotation_deg", "deviation of rotation, degrees"),
    )
    for axis, (field, label) in zip(axes[:, 2], deviations, strict=True):
        for offset, series in enumerate(LAYER_SERIES):
            values = [summary[f"layer {series} | {layer}"][field] for layer in range(layers)]
            places = [layer + 0.27 * (offset - 1) for layer in range(layers)]
            axis.bar(places, values, width=0.27, label=series)
        axis.set(xlabel="index of the reduced global layer", ylabel=label)
        axis.legend(fontsize=7)
    figure.suptitle(f"Reference model, {frames} frames: queries against keys and values")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=24, help="how many (default: 24)")
    parser.add_argument("--skip", type=int, default=0, help="number of clips to skip at the start")
    parser.add_argument("--frames", type=int, default=48, help="frames per clip (default: 48)")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no clip after this time")
    kept = Path("runs") / "asymmetry"
    parser.add_argument("--runs", type=Path, default=kept, help="folder of finished clips")
    parser.add_argument("--weights", default="shipped", help="as for spark3r.reference.load")
    scenes = Path.home() / ".cache" / "spark3r" / "scenes"
    parser.add_argument("--cache", type=Path, default=scenes, help="folder of rendered clips")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    model = load(weights=options.weights)
    runs = measure(model, options)
    summary, clips = summarise(runs), len(runs["dense"])
    show(summary, clips, options.frames)
    show_equal_latency(summary)
    document = {
        "weights": weights_of(model),
        "clips": clips,
        "frames": options.frames,
        "first_seed": EVALUATION[FIRST_CLIP + options.skip],
        "threads": torch.get_num_threads(),
        "schedules": summary,
    }
    write_result(document, options.output / "asymmetry.json")
    plot(summary, options.output / "asymmetry.png", options.frames)


if __name__ == "__main__":
    main()
