"""Whether the bundle adjustment of ``spark3r export --refine`` makes poses better.

    python benchmarks/refine.py --clips 10 [--output benchmarks/results/refine.json]

It needs the extra ``colmap``. Evaluation scenes are rendered at 320x320 pixels, 24 frames each.
Each is refined from several starts: the cameras that the reference model predicts from the same
frames at 64x64, and the true cameras with noise. The pose error is the mean over all pairs of
frames of the larger of the relative rotation error and the error of the direction of translation,
in degrees.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from results_io import print_markdown, write_result

from spark3r import load_clip, load_model, reconstruct
from spark3r.clips import Clip
from spark3r.io import Output, new_folder, read_output, write_outputs
from spark3r.io.exports.matching import match_frames
from spark3r.io.exports.overlap import overlapping_pairs
from spark3r.io.exports.refinement import refine
from spark3r.io.exports.tracks import Cameras, Floats
from spark3r.io.originals import write_originals
from spark3r.metrics.pose import relative_pose_errors
from spark3r.reference.scenes.render import rendered_clip
from spark3r.reference.scenes.seeds import EVALUATION

FIRST_CLIP = 5000  # among the evaluation seeds, beyond those of other scripts
FRAMES, SIZE = 24, 320
MODEL = "the model's cameras"
NOISE = {"true cameras, 2° off": 2.0, "true cameras, .05° off": 0.05}
KEPT_RAISE = 1.02  # of the pose error, at most, where the adjusted cameras are kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and store the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for seed in range(EVALUATION.start + FIRST_CLIP, EVALUATION.start + FIRST_CLIP + options.clips):
        rows += measured(seed)
    print_markdown(
        ("start", "lowered", "kept", "kept and raised by over 2 %", "error before", "after"),
        [(start, *summary(rows, start).values()) for start in (MODEL, *NOISE)],
    )
    write_result(
        {"summary": {start: summary(rows, start) for start in (MODEL, *NOISE)}, "clips": rows},
        options.output,
    )


def summary(rows: Sequence[Mapping[str, Any]], start: str) -> dict[str, Any]:
    """Return the counts and median pose errors of one start."""
    own = [row for row in rows if row["start"] == start]
    kept = [row for row in own if row["rolled_back"] is None]
    return {
        "lowered": f"{sum(row['after'] < row['before'] for row in own)} of {len(own)}",
        "kept": len(kept),
        "raised": sum(row["after"] > KEPT_RAISE * row["before"] for row in kept),
        "before": round(float(np.median([row["before"] for row in own])), 3),
        "after": round(float(np.median([row["after"] for row in own])), 3),
    }


def measured(seed: int) -> list[dict[str, Any]]:
    """Return one row for each start of a scene."""
    truth = rendered_clip(seed, FRAMES, SIZE, SIZE)
    with tempfile.TemporaryDirectory() as scratch:
        output = reconstructed(truth, Path(scratch))
        images = Path(scratch) / "images"
        images.mkdir()
        names = write_originals(output, images)
        cameras = Cameras(output.extrinsics.numpy(), output.intrinsics.numpy(), output.sizes)
        matches = match_frames(images, names, cameras, overlapping_pairs(output, cameras))
    assert truth.extrinsics is not None
    assert truth.intrinsics is not None
    true = Cameras(
        truth.extrinsics.double().numpy(), truth.intrinsics.double().numpy(), output.sizes
    )
    starts = {MODEL: cameras} | {name: noisy(true, deg, seed) for name, deg in NOISE.items()}
    rows = []
    for start, given in starts.items():
        made = refine(given, names, matches)
        focal = np.abs(made.cameras.intrinsics[:, 0, 0] / true.intrinsics[:, 0, 0] - 1)
        rows.append(
            {
                "seed": seed,
                "start": start,
                "before": pose_error(given, true),
                "after": pose_error(made.cameras, true),
                "rolled_back": made.rolled_back,
                "held_out_px": made.held_out_px,
                "used_px": made.used_px,
                "held_out_tracks": made.held_out_tracks,
                "track_length": made.track_length,
                "focal_error": float(np.median(focal)),
            }
        )
        print(rows[-1], flush=True)
    return rows


def reconstructed(truth: Clip, scratch: Path) -> Output:
    """Return what ``spark3r run`` writes of rendered frames in a folder of PNG files."""
    folder = scratch / "clip"
    folder.mkdir()
    for number, image in enumerate(truth.images):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number:05}.png")
    footage = load_clip(str(folder), "reference")
    made = reconstruct(load_model("reference"), footage.clip)
    with new_folder(scratch / "run") as written:
        write_outputs(written, footage, made.run.prediction, {"clip": str(folder)})
    return read_output(scratch / "run")


def noisy(true: Cameras, degrees: float, seed: int) -> Cameras:
    """Return cameras turned by angles of this size, moved and zoomed by as many hundredths.

    Centres move by ``degrees`` hundredths of the path's extent, and focal lengths change by half as
    many hundredths (each a standard deviation).
    """
    rng = np.random.default_rng(seed)
    count = len(true.sizes)
    axis = np.radians(degrees) * rng.normal(size=(count, 3)) / np.sqrt(3)
    cross = np.zeros((count, 3, 3))
    for row, column, index, sign in ((0, 1, 2, -1), (0, 2, 1, 1), (1, 2, 0, -1)):
        cross[:, row, column] = sign * axis[:, index]
        cross[:, column, row] = -sign * axis[:, index]
    turn: Floats = torch.linalg.matrix_exp(torch.from_numpy(cross)).numpy()
    rotation = turn @ true.extrinsics[:, :, :3]
    extent = np.linalg.norm(np.ptp(true.centres, axis=0))
    centres = true.centres + degrees / 100 * extent * rng.normal(size=(count, 3)) / np.sqrt(3)
    moved = -np.einsum("sij,sj->si", rotation, centres)
    intrinsics = true.intrinsics.copy()
    intrinsics[:, :2, :2] *= np.exp(degrees / 200 * rng.normal(size=count))[:, None, None]
    return Cameras(np.concatenate([rotation, moved[:, :, None]], 2), intrinsics, true.sizes)


def pose_error(cameras: Cameras, true: Cameras) -> float:
    """Return the mean over pairs of the larger of both relative errors, in degrees."""
    errors = relative_pose_errors(
        torch.from_numpy(cameras.extrinsics), torch.from_numpy(true.extrinsics)
    )
    return float(torch.maximum(errors.rotation_deg, errors.translation_deg).mean())


if __name__ == "__main__":
    main()
