"""Keys and values of frames far apart, against strides over frames and over patches.

    python benchmarks/diverse.py [--kinds ordered shuffled cameras] [--clips 24]
    python benchmarks/diverse.py --cost

All layers of the reference model get one key-value operator and one factor, on held-out rendered
clips of 48 frames: in the order of their path, as an unordered photo set, and of two cameras that
come from both ends of the path, one after the other. It reports the deviation from the dense run
(log depth, relative rotation) and the error relative to the dense run's, as in
``benchmarks/operators.py``: means over clips with 95 % intervals, and paired differences from
``diverse_frames``. ``--cost`` measures which share of a pass the choice of frames takes. Kinds are
stored one by one, so that a run may do some of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from operators import relative_error
from results_io import RESULTS, provenance, store_json

import spark3r
from spark3r import Clip, DiverseFrames, Operators, Schedule, TemporalStride, TokenStride
from spark3r.families.registry import named_family
from spark3r.identity import fingerprint
from spark3r.metrics import log_depth_deviation, pose_metrics
from spark3r.reduction.diversity import frames_by_slot
from spark3r.reduction.operators import KeyValuePruning
from spark3r.reference import load
from spark3r.reference.scenes.render import focal_length, render_path, rendered_clip
from spark3r.reference.scenes.scene import random_scene
from spark3r.reference.scenes.seeds import EVALUATION
from spark3r.runner import Runner

FRAMES, LAYERS, SIZE = 48, 8, 64
FACTORS = (4, 8, 16)
COST_FRAMES, COST_FACTOR = 512, 13
FIGURES = ("depth_percent", "rotation_deg", "error_percent")

OPERATORS: dict[str, KeyValuePruning] = {
    "diverse_frames": DiverseFrames(),
    "temporal_stride": TemporalStride(),
    "token_stride, anchor kept, beta 1": TokenStride(keep_anchor=True, mass_correction=1.0),
}
OURS = "diverse_frames"


def two_cameras(seed: int) -> Clip:
    """Return a clip of two cameras that move towards each other, one after the other."""
    scene = random_scene(seed)
    half = torch.linspace(0, 0.5, FRAMES // 2, dtype=torch.float64)
    images, depth, extrinsics = render_path(scene, torch.cat((half, 1 - half)), SIZE, SIZE)
    focal = focal_length(scene, SIZE)
    intrinsics = torch.tensor([[focal, 0, SIZE / 2], [0, focal, SIZE / 2], [0, 0, 1]])
    return Clip(
        f"rendered:{seed}", images, intrinsics.expand(FRAMES, 3, 3).clone(), depth, extrinsics
    )


KINDS: dict[str, Callable[[int], Clip]] = {
    "ordered": lambda seed: rendered_clip(seed, FRAMES),
    "shuffled": lambda seed: rendered_clip(seed, FRAMES, ordered=False),
    "cameras": two_cameras,
}


def schedule(operator: KeyValuePruning, factor: int) -> Schedule:
    """Return the schedule with this operator and factor in all layers."""
    return Schedule.uniform(LAYERS, key_value=factor, operators=Operators(key_value=operator))


def measure(runner: Runner, clips: list[Clip]) -> list[dict[str, Any]]:
    """Return one row for each operator and factor, with the figures of every clip."""
    dense = [runner.predict(clip) for clip in clips]
    rows = []
    for factor in FACTORS:
        for name, operator in OPERATORS.items():
            with spark3r.apply(runner.model, schedule(operator, factor)):
                reduced = [runner.predict(clip) for clip in clips]
            figures: dict[str, list[float]] = {each: [] for each in FIGURES}
            for found, base, clip in zip(reduced, dense, clips, strict=True):
                rotation = pose_metrics(found.extrinsics, base.extrinsics).rotation_deg
                figures["depth_percent"].append(100 * log_depth_deviation(found.depth, base.depth))
                figures["rotation_deg"].append(rotation)
                figures["error_percent"].append(100 * relative_error(found, base, clip))
            rows.append({"operator": name, "factor": factor, **figures})
    return rows


def interval(values: list[float]) -> str:
    """Return mean and half of the 95 % interval over clips."""
    half = 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):+7.2f} ± {half:5.2f}"


def print_rows(kind: str, rows: list[dict[str, Any]]) -> None:
    """Print each operator's figures, and the paired differences of ours from it."""
    for row in rows:
        ours = next(r for r in rows if (r["operator"], r["factor"]) == (OURS, row["factor"]))
        cells = []
        for figure in FIGURES:
            cells.append(interval(row[figure]))
            if row is not ours:
                apart = [a - b for a, b in zip(ours[figure], row[figure], strict=True)]
                cells.append(f"ours {interval(apart)}")
        print(f"{kind:<9} {row['operator']:<34} {row['factor']:>3}  {'  '.join(cells)}")


def cost(runner: Runner) -> dict[str, float]:
    """Return seconds of a reduced pass, of the choice of frames in all layers, and their ratio."""
    clip = rendered_clip(EVALUATION[0], 16)
    images = clip.images.repeat(COST_FRAMES // 16, 1, 1, 1)
    layout = runner.layout(images)
    with spark3r.apply(runner.model, schedule(OPERATORS[OURS], COST_FACTOR), guard=False):
        passes = [seconds(lambda: runner.run(images)) for _ in range(4)]
    width = runner.record().width
    tokens = torch.randn(1, layout.tokens, width or 1)
    with torch.inference_mode():
        choices = [
            LAYERS * seconds(lambda: frames_by_slot(tokens, layout, COST_FACTOR)) for _ in range(9)
        ]
    whole, chosen = statistics.median(passes[1:]), statistics.median(choices[1:])
    return {
        "frames": COST_FRAMES,
        "factor": COST_FACTOR,
        "pass_s": whole,
        "choice_s": chosen,
        "share_percent": 100 * chosen / whole,
    }


def seconds(call: Callable[[], object]) -> float:
    """Return the CPU time of a call on this process's threads."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--clips", type=int, default=24, help="clips of each kind (default: 24)")
    parser.add_argument("--cost", action="store_true", help="measure the cost, and nothing else")
    parser.add_argument("--output", type=Path, default=RESULTS / "diverse.json")
    arguments = parser.parse_args()

    runner = Runner.of(load(), named_family("reference"))
    document = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    document |= {"fingerprint": fingerprint(runner.attention), "frames": FRAMES}
    if arguments.cost:
        document["cost"] = provenance() | cost(runner)
        print(document["cost"])
    else:
        for kind in arguments.kinds:
            clips = [KINDS[kind](seed) for seed in EVALUATION[: arguments.clips]]
            rows = measure(runner, clips)
            print_rows(kind, rows)
            names = [clip.name for clip in clips]
            document[kind] = provenance() | {"clips": names, "rows": rows}
    store_json(arguments.output, document)


if __name__ == "__main__":
    main()
