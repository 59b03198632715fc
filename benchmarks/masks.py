"""Moving objects: the pose error with and without a mask over them.

    python benchmarks/masks.py [--clips 24] [--output benchmarks/results/masks.json]

Held-out rendered clips of 24 frames in which the objects that cover most pixels move on straight
lines while the rest stands still. Each clip runs dense and with the factors of the shipped profile
at every length, without a mask and with the exact mask of the moving objects; and dense without any
motion, as the best that a mask could do. It reports errors of relative rotation, translation
direction and, over the pixels that stand still, depth: means over clips with 95 % intervals, and
paired differences.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from results_io import RESULTS, write_result
from torch import Tensor

import spark3r
from spark3r import Clip, LengthRule, Prediction, Schedule
from spark3r.identity import fingerprint
from spark3r.metrics import pose_metrics
from spark3r.profile import load_profile
from spark3r.reference import load
from spark3r.reference.scenes.render import focal_length, render_path, seen_objects
from spark3r.reference.scenes.scene import Scene, moved, random_scene
from spark3r.reference.scenes.seeds import EVALUATION
from spark3r.runner import Runner

FRAMES, LAYERS, SIZE = 24, 8, 64
MOVED = 3
STEP = 0.6
"""Way of an object over the clip, in multiples of its distance from the first camera."""

FIGURES = ("rotation_deg", "translation_deg", "depth_percent")


def moving_clip(seed: int) -> tuple[Clip, Clip, Tensor, float]:
    """Return a clip with motion, the same without, where nothing moves, and the moving share."""
    scene = random_scene(seed)
    u = torch.linspace(0, 1, FRAMES, dtype=torch.float64)
    still = torch.stack([seen_objects(scene, u[i : i + 1], SIZE, SIZE)[0] for i in range(FRAMES)])
    counts = torch.bincount(still[still >= 0], minlength=len(scene.centre))
    objects = counts.argsort(descending=True)[:MOVED]
    generator = torch.Generator().manual_seed(seed)
    ways = torch.nn.functional.normalize(torch.randn(MOVED, 3, generator=generator), dim=1)
    start = scene.path.poses(u[:1])[0, :, 3].float()
    ways = STEP * ways * (scene.centre[objects] - start).norm(dim=1, keepdim=True)
    parts, unmoved = [], []
    for i in range(FRAMES):
        own: Scene = moved(scene, objects, (i / (FRAMES - 1) - 0.5) * ways)
        parts.append(render_path(own, u[i : i + 1], SIZE, SIZE))
        seen = seen_objects(own, u[i : i + 1], SIZE, SIZE)[0]
        unmoved.append(~torch.isin(seen, objects))
    images, depth, extrinsics = (torch.cat(each) for each in zip(*parts, strict=True))
    focal = focal_length(scene, SIZE)
    intrinsics = torch.tensor([[focal, 0, SIZE / 2], [0, focal, SIZE / 2], [0, 0, 1]])
    intrinsics = intrinsics.expand(FRAMES, 3, 3).clone()
    clip = Clip(f"rendered:{seed}", images, intrinsics, depth, extrinsics)
    plain = render_path(scene, u, SIZE, SIZE)
    mask = torch.stack(unmoved)
    share = float((~mask).float().mean())
    return clip, replace(clip, images=plain[0], depth=plain[1]), mask, share


def errors(found: Prediction, clip: Clip, mask: Tensor) -> dict[str, float]:
    """Return the figures of a prediction; depth after one median scale per clip."""
    assert clip.extrinsics is not None
    assert clip.depth is not None
    pose = pose_metrics(found.extrinsics, clip.extrinsics)
    apart = (found.depth / clip.depth)[mask].log()
    return {
        "rotation_deg": pose.rotation_deg,
        "translation_deg": pose.translation_deg,
        "depth_percent": 100 * float((apart - apart.median()).abs().mean()),
    }


def measure(runner: Runner, seeds: range) -> tuple[list[dict[str, Any]], list[float]]:
    """Return the figures of every clip under each treatment, and the moving shares."""
    # The profile leaves clips as short as these dense.
    reduced = replace(load_profile("reference").schedule(), length=LengthRule())
    treatments = {"dense": Schedule.dense(LAYERS), "reduced": reduced}
    rows: dict[str, list[dict[str, float]]] = {}
    shares = []
    for seed in seeds:
        clip, still, mask, share = moving_clip(seed)
        shares.append(share)
        everything = torch.ones_like(mask)
        found = {"dense, nothing moves": errors(runner.predict(still), still, everything)}
        for name, schedule in treatments.items():
            with spark3r.apply(runner.model, schedule, guard=False) as handle:
                for how, around in (("no mask", nullcontext()), ("mask", handle.masking(mask))):
                    with around:
                        found[f"{name}, {how}"] = errors(runner.predict(clip), clip, mask)
        for name, figures in found.items():
            rows.setdefault(name, []).append(figures)
    return [
        {"treatment": name, **{figure: [each[figure] for each in found] for figure in FIGURES}}
        for name, found in rows.items()
    ], shares


def interval(values: list[float]) -> str:
    """Return mean and half of the 95 % interval over clips."""
    half = 1.96 * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):6.2f} ± {half:5.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=24, help="held-out clips (default: 24)")
    parser.add_argument("--output", type=Path, default=RESULTS / "masks.json")
    arguments = parser.parse_args()

    runner = Runner.of(load())
    seeds = EVALUATION[1000 : 1000 + arguments.clips]
    rows, shares = measure(runner, seeds)
    by_name = {row["treatment"]: row for row in rows}
    print(f"moving pixels: {100 * statistics.fmean(shares):.1f} %")
    for name, row in by_name.items():
        cells = [interval(row[figure]) for figure in FIGURES]
        base = by_name.get(name.replace(", mask", ", no mask"))
        if base is not None and base is not row:
            for figure in FIGURES:
                apart = [a - b for a, b in zip(row[figure], base[figure], strict=True)]
                cells.append(f"mask - none {interval(apart)}")
        print(f"{name:<22}  {'  '.join(cells)}", flush=True)
    record = {
        "fingerprint": fingerprint(runner.attention),
        "frames": FRAMES,
        "clips": [f"rendered:{seed}" for seed in seeds],
        "moving_share": shares,
        "rows": rows,
    }
    write_result(record, arguments.output)


if __name__ == "__main__":
    main()
