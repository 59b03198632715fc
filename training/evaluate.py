"""Score the reference model on scenes and footage that it has not seen.

`python -m training.evaluate --frames 8` scores the old generator's held-out scenes: 8 key frames
that are spread evenly over the path, and all their pairs, without any alignment. Pose errors are
medians and depth errors means over a clip; both are then averaged over the clips. More frames
sample the same path more densely, and the same key frames are scored.

`--rooms FOLDER` adds path-traced rooms and `--kitchen FOLDER` a real kitchen. There all pairs of 48
frames are scored, and depth after one median scale per clip.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from spark3r.clips import Clip
from spark3r.geometry import decode_pose
from spark3r.metrics import depth_metrics, pose_metrics
from spark3r.reference.model import ReferenceModel
from spark3r.reference.scenes.render import focal_length, render_path
from spark3r.reference.scenes.scene import random_scene
from spark3r.reference.scenes.seeds import CALIBRATION, EVALUATION
from spark3r.reference.weights import load

from .footage import (
    KITCHEN_STARTS,
    FootageScores,
    mean_scores,
    read_kitchen,
    read_rooms,
    score_footage,
)

KEY_FRAMES = 8
SIDE = 64
CONSTANT_DEPTH = 0.93  # depth of the trivial baseline, in units of frame 0's mean depth


@dataclass(frozen=True)
class Scores:
    """Scores of one clip, or means over clips."""

    abs_rel: float
    delta_125: float
    rotation_deg: float
    translation_deg: float
    auc_30: float
    auc_15: float
    auc_5: float
    abs_rel_aligned: float  # one median scale per frame
    abs_rel_first: float  # of frame 0


def path_times(frames: int) -> tuple[Tensor, list[int]]:
    """Return evenly spread path times that contain the key frames.

    Args:
        frames: Number of frames, at least `KEY_FRAMES`.

    Returns:
        Path times, float64 `[frames]`, and the indices of the key frames. Each key frame replaces
        the evenly spread frame that is nearest to it.

    Raises:
        ValueError: If there are fewer frames than key frames.
    """
    if frames < KEY_FRAMES:
        raise ValueError(f"need at least the {KEY_FRAMES} key frames, got {frames}")
    u = torch.linspace(0.0, 1.0, frames, dtype=torch.float64)
    keys = torch.linspace(0.0, 1.0, KEY_FRAMES, dtype=torch.float64)
    places = (keys * (frames - 1)).round().long()
    u[places] = keys
    return u, places.tolist()


def evaluation_clip(seed: int, frames: int, cache: Path | None) -> Clip:
    """Return a clip for evaluation, rendered or read from the cache.

    Args:
        seed: Seed of the scene.
        frames: Number of frames S.
        cache: Folder of rendered clips; None renders every clip anew.

    Returns:
        The clip, with colours rounded to 8 bits.
    """
    path = cache / f"{SIDE}-{frames}-{seed}.npz" if cache else None
    scene = random_scene(seed)
    if path and path.exists():
        with np.load(path) as file:
            colours, depth, extrinsics = (
                torch.from_numpy(file[name]) for name in ("images", "depth", "extrinsics")
            )
    else:
        u, _ = path_times(frames)
        images, depth, extrinsics = render_path(scene, u, SIDE, SIDE)
        colours = (images * 255).round().to(torch.uint8)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npz")
            np.savez(
                partial,
                images=colours.numpy(),
                depth=depth.numpy(),
                extrinsics=extrinsics.numpy(),
            )
            partial.replace(path)
    focal = focal_length(scene, SIDE)
    intrinsics = torch.tensor([[focal, 0, SIDE / 2], [0, focal, SIDE / 2], [0, 0, 1]])
    return Clip(
        name=f"rendered:{seed}",
        images=colours.float() / 255,
        intrinsics=intrinsics.expand(frames, 3, 3).clone(),
        depth=depth,
        extrinsics=extrinsics,
    )


def score(depth: Tensor, extrinsics: Tensor, clip: Clip) -> Scores:
    """Return the scores of predictions for a clip.

    Args:
        depth: Predicted depth `[S, H, W]`, in units of the first frame's mean depth.
        extrinsics: Predicted world-to-camera `[S, 3, 4]`.
        clip: Ground truth of the same frames. Its frame 0 is the first frame of the model's clip.

    Raises:
        ValueError: If the clip has no ground truth.
    """
    if clip.depth is None or clip.extrinsics is None:
        raise ValueError(f"clip {clip.name} has no ground truth")
    target = clip.depth / clip.depth[0].mean()
    plain = depth_metrics(depth, target)
    pose = pose_metrics(extrinsics, clip.extrinsics)
    return Scores(
        abs_rel=plain.abs_rel,
        delta_125=plain.delta_125,
        rotation_deg=pose.rotation_deg,
        translation_deg=pose.translation_deg,
        auc_30=pose.auc_30,
        auc_15=pose.auc_15,
        auc_5=pose.auc_5,
        abs_rel_aligned=depth_metrics(depth, target, align="frame").abs_rel,
        abs_rel_first=depth_metrics(depth[:1], target[:1]).abs_rel,
    )


def select(clip: Clip, frames: list[int]) -> Clip:
    """Return some frames of a clip that has ground truth."""
    assert clip.intrinsics is not None
    assert clip.depth is not None
    assert clip.extrinsics is not None
    return Clip(
        name=clip.name,
        images=clip.images[frames],
        intrinsics=clip.intrinsics[frames],
        depth=clip.depth[frames],
        extrinsics=clip.extrinsics[frames],
    )


@torch.inference_mode()
def evaluate_clip(model: ReferenceModel, clip: Clip, keys: list[int]) -> tuple[Scores, float]:
    """Return the scores of a clip's key frames, together with all frames and each alone.

    Args:
        model: The model.
        clip: A clip with ground truth.
        keys: Indices of the key frames; the first must be 0.

    Returns:
        The scores when the model sees all frames, and the median-aligned AbsRel when it sees each
        key frame alone.
    """
    device = next(model.parameters()).device
    predictions = model(clip.images.to(device))
    extrinsics, _ = decode_pose(predictions["pose_enc"][0].cpu(), (SIDE, SIDE))
    depth = predictions["depth"][0, keys, :, :, 0].cpu()
    wanted = select(clip, keys)
    single = model(wanted.images[:, None].to(device))["depth"][:, 0, :, :, 0].cpu()
    assert wanted.depth is not None
    alone = depth_metrics(single, wanted.depth, align="frame").abs_rel
    return score(depth, extrinsics[keys], wanted), alone


def evaluate(
    model: ReferenceModel, seeds: Iterable[int], frames: int, cache: Path | None = None
) -> dict[str, float | int]:
    """Return the mean scores of the model over scenes.

    Args:
        model: The model.
        seeds: Seeds of the scenes.
        frames: Frames per clip, at least `KEY_FRAMES`.
        cache: Folder of rendered clips; None renders every clip anew.

    Returns:
        The numbers of `scenes` and `frames`; means over clips of the fields of `Scores`;
        `multi_view_gain`, the relative change of the aligned AbsRel from key frames alone to all
        frames together (negative is better), with the ends of its paired 95 % interval; and the
        scores of constant depth with identity poses as `trivial_...`.
    """
    _, keys = path_times(frames)
    together: list[Scores] = []
    trivial: list[Scores] = []
    alone: list[float] = []
    for seed in seeds:
        clip = evaluation_clip(seed, frames, cache)
        scores, single = evaluate_clip(model, clip, keys)
        together.append(scores)
        alone.append(single)
        wanted = select(clip, keys)
        identity = torch.eye(3, 4).expand(len(keys), 3, 4)
        constant = torch.full((len(keys), SIDE, SIDE), CONSTANT_DEPTH)
        trivial.append(score(constant, identity, wanted))
    joint = torch.tensor([s.abs_rel_aligned for s in together], dtype=torch.float64)
    apart = torch.tensor(alone, dtype=torch.float64)
    gain = (joint - apart) / apart.mean()
    spread = 1.96 * float(gain.std()) / math.sqrt(len(gain))
    result: dict[str, float | int] = {"scenes": len(together), "frames": frames}
    result |= _mean(together)
    result |= {
        "multi_view_gain": float(gain.mean()),
        "multi_view_gain_low": float(gain.mean()) - spread,
        "multi_view_gain_high": float(gain.mean()) + spread,
        "abs_rel_aligned_alone": float(apart.mean()),
    }
    return result | {f"trivial_{name}": value for name, value in _mean(trivial).items()}


def _mean(scores: list[Scores]) -> dict[str, float]:
    rows = [asdict(row) for row in scores]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _print(result: dict[str, float | int], footage: dict[str, dict[str, FootageScores]]) -> None:
    """Print the table of all clips, and what several frames gain over one."""
    table = Table(title="the reference model on clips that it has not seen")
    table.add_column("clips")
    for column in ("AUC@30", "rotation", "translation", "AbsRel", "δ<1.25"):
        table.add_column(column, justify="right")
    console = Console()
    if result:
        clips = f"{result['scenes']} procedural scenes, {result['frames']} frames"
        for name, prefix in (("constant depth, identity pose", "trivial_"), (clips, "")):
            row = {field.name: float(result[prefix + field.name]) for field in fields(Scores)}
            names = (field.name for field in fields(FootageScores))
            table.add_row(name, *_cells(FootageScores(**{n: row[n] for n in names})))
    for kind, clips_by_name in footage.items():
        for name, scores in clips_by_name.items():
            table.add_row(f"  {name}", *_cells(scores))
        mean = mean_scores(list(clips_by_name.values()))
        table.add_row(f"{kind}, mean of {len(clips_by_name)}", *_cells(mean))
    console.print(table)
    if result:
        console.print(
            "procedural, aligned AbsRel, all frames together against each alone: "
            f"{result['multi_view_gain']:+.1%} (95 % interval "
            f"{result['multi_view_gain_low']:+.1%} to {result['multi_view_gain_high']:+.1%})"
        )


def _cells(scores: FootageScores) -> list[str]:
    return [
        f"{scores.auc_30:.3f}",
        f"{scores.rotation_deg:.1f}°",
        f"{scores.translation_deg:.1f}°",
        f"{scores.abs_rel:.3f}",
        f"{scores.delta_125:.3f}",
    ]


def main() -> None:
    """Score the model and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--frames", type=int, default=KEY_FRAMES, help="per procedural clip (default: 8)")
    add("--scenes", type=int, default=320, help="number of procedural scenes (default: 320)")
    add(
        "--seeds",
        choices=("evaluation", "calibration"),
        default="evaluation",
        help="range of the scenes' seeds (default: evaluation)",
    )
    add("--rooms", type=Path, help="folder of path-traced clips, each a folder of its own")
    add("--kitchen", type=Path, help="folder of the kitchen's frames, poses and depth")
    add("--weights", default="shipped", help="shipped (default), random, or a file")
    add("--device", default="cpu", help="default: cpu")
    default = Path.home() / ".cache" / "spark3r" / "scenes"
    add("--cache", type=Path, default=default, help="folder of rendered clips")
    add("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    model = load(options.device, options.weights)
    seeds = {"evaluation": EVALUATION, "calibration": CALIBRATION}[options.seeds]
    chosen: Iterable[int] | Iterator[int] = seeds[: options.scenes]
    if not options.json:
        chosen = track(chosen, description="scenes", console=Console(stderr=True))
    result = evaluate(model, chosen, options.frames, options.cache) if options.scenes else {}
    footage: dict[str, dict[str, FootageScores]] = {}
    if options.rooms:
        rooms = read_rooms(options.rooms)
        footage["path-traced rooms"] = {clip.name: score_footage(model, clip) for clip in rooms}
    if options.kitchen:
        stretches = [read_kitchen(options.kitchen, start) for start in KITCHEN_STARTS]
        footage["kitchen"] = {clip.name: score_footage(model, clip) for clip in stretches}
    if options.json:
        rows = {k: {n: asdict(row) for n, row in v.items()} for k, v in footage.items()}
        print(json.dumps(result | rows))
    else:
        _print(result, footage)


if __name__ == "__main__":
    main()
