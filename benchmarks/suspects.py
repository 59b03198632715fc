"""How many failed frames are found, and how many good ones are suspected.

    python benchmarks/suspects.py [--clips 24] [--output benchmarks/results/suspects.json]

Held-out rendered clips of 48 frames run dense as they are and with failures made on purpose: three
frames in the middle are blurred along a line, show a nearly even wall, or show something else that
covers four fifths of them and moves; or the clip goes on in another scene. It reports the share of
failed frames that are not suspected (misses), the share of the other frames that are (false
alarms), and how much the failures raise the error of the frames' poses.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from results_io import RESULTS, print_markdown, write_result
from torch import Tensor
from torch.nn import functional as F

from spark3r.identity import fingerprint
from spark3r.metrics.pose import relative_pose_errors
from spark3r.metrics.suspects import frame_figures, suspects
from spark3r.reference import load
from spark3r.reference.scenes.render import rendered_clip
from spark3r.reference.scenes.seeds import EVALUATION
from spark3r.runner import Runner

FRAMES, FIRST_CLIP, OTHER = 48, 7000, 500
FAILED = (20, 21, 22)
CUT = 24


def blurred(images: Tensor, other: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the clip with frames that are blurred by the width of a quarter of them."""
    width = images.shape[-1] // 8 * 2 - 1
    kernel = torch.ones(1, 1, 1, width) / width
    frames = images[list(FAILED)].flatten(0, 1)[:, None]
    padded = F.pad(frames, (width // 2, width // 2, 0, 0), mode="replicate")
    images = images.clone()
    images[list(FAILED)] = F.conv2d(padded, kernel).view(len(FAILED), 3, *images.shape[2:])
    return images, FAILED


def even(images: Tensor, other: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the clip with frames that have a fiftieth of their contrast, and noise."""
    images, chosen = images.clone(), list(FAILED)
    generator = torch.Generator().manual_seed(0)
    mean = images[chosen].mean(dim=(2, 3), keepdim=True)
    noise = 0.01 * torch.randn(images[chosen].shape, generator=generator)
    images[chosen] = (mean + 0.02 * (images[chosen] - mean) + noise).clamp(0, 1)
    return images, FAILED


def covered(images: Tensor, other: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the clip with something that moves before the camera."""
    images = images.clone()
    edge = images.shape[-1] // 10
    inside = slice(edge, images.shape[-1] - edge)
    for number, frame in enumerate(FAILED):
        moved = torch.roll(other[0], (number - 1) * images.shape[-1] // 8, dims=2)
        images[frame, :, inside, inside] = moved[:, inside, inside]
    return images, FAILED


def cut(images: Tensor, other: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the clip up to the middle, and then another scene."""
    return torch.cat([images[:CUT], other[: len(images) - CUT]]), (CUT,)


FAILURES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, tuple[int, ...]]]] = {
    "none": lambda images, other: (images, ()),
    "blurred": blurred,
    "even": even,
    "covered": covered,
    "cut": cut,
}


def measure(runner: Runner, clips: int) -> list[dict[str, Any]]:
    """Return for every clip and failure the failed frames, the suspects and the pose errors."""
    rows = []
    for number in range(clips):
        seed = EVALUATION[FIRST_CLIP + number]
        clip = rendered_clip(seed, FRAMES)
        other = rendered_clip(EVALUATION[FIRST_CLIP + OTHER + number], FRAMES).images
        assert clip.extrinsics is not None
        for name, make in FAILURES.items():
            images, failed = make(clip.images, other)
            found = runner.predict(replace(clip, images=images))
            figures = frame_figures(images, found.depth, found.intrinsics, found.extrinsics)
            errors = relative_pose_errors(found.extrinsics, clip.extrinsics)
            rows.append(
                {
                    "seed": seed,
                    "failure": name,
                    "failed": failed,
                    "suspects": {
                        frame: words for frame, words in enumerate(suspects(figures)) if words
                    },
                    "rotation_deg": float(errors.rotation_deg.median()),
                }
            )
        print(f"clip {number + 1} of {clips}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=24, help="held-out clips (default: 24)")
    parser.add_argument("--weights", default="shipped", help="as for spark3r.reference.load")
    parser.add_argument("--output", type=Path, default=RESULTS / "suspects.json")
    options = parser.parse_args()

    runner = Runner.of(load(weights=options.weights))
    rows = measure(runner, options.clips)
    table, shown = [], []
    for name in FAILURES:
        own = [row for row in rows if row["failure"] == name]
        failed = [(row, frame) for row in own for frame in row["failed"]]
        good = [
            (row, frame)
            for row in own
            for frame in range(FRAMES if name != "cut" else CUT)
            if frame not in row["failed"]
        ]
        missed = [frame not in row["suspects"] for row, frame in failed]
        alarms = [frame in row["suspects"] for row, frame in good]
        figures = {
            "failure": name,
            "misses": statistics.fmean(missed) if missed else None,
            "false_alarms": statistics.fmean(alarms),
            "rotation_deg": statistics.fmean(row["rotation_deg"] for row in own),
        }
        table.append(figures)
        shown.append(
            [
                name,
                "-" if not missed else f"{figures['misses']:.1%} of {len(missed)}",
                f"{figures['false_alarms']:.1%} of {len(alarms)}",
                f"{figures['rotation_deg']:.2f}°",
            ]
        )
    print_markdown(["failure", "misses", "false alarms", "rotation error of the clip"], shown)
    record = {
        "fingerprint": fingerprint(runner.attention),
        "frames": FRAMES,
        "clips": options.clips,
        "table": table,
        "rows": rows,
    }
    write_result(record, options.output)


if __name__ == "__main__":
    main()
