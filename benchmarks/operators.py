"""What the paper leaves open about its operators, decided on the reference model.

    python benchmarks/operators.py [--clips 24] [--output benchmarks/results/operators.json]

Each row changes one thing about query merging or key-value pruning in all layers, on the same
rendered calibration clips, and reports deviation from the dense run (log depth after one median
scale per clip, relative rotation) and error against ground truth relative to the dense run's
(geometric mean of rotation, translation direction and aligned AbsRel), mean over clips with its
standard error. Deviation and error disagree; both are shown.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from results_io import write_result
from torch import Tensor

import spark3r
from spark3r import Clip, Operators, Prediction, Schedule
from spark3r.families.registry import detect
from spark3r.identity import fingerprint
from spark3r.metrics import depth_metrics, log_depth_deviation, pose_metrics
from spark3r.reduction import lattice, merging, pruning, unmerging
from spark3r.reference import load
from spark3r.reference.scenes.render import rendered_clip
from spark3r.reference.scenes.seeds import CALIBRATION

Variant = Callable[[], "contextmanager[None]"]
FRAMES = 48
HEADS = 4


def cells(frames: int, height: int, width: int, factor: int) -> Tensor:
    """Offsets that cycle inside rectangular cells, as region sampling for image models does."""
    rows = max(a for a in range(1, math.isqrt(factor) + 1) if factor % a == 0)
    columns = factor // rows
    y = torch.arange(height).view(1, -1, 1) % rows
    x = torch.arange(width).view(1, 1, -1) % columns
    frame = torch.arange(frames).view(-1, 1, 1)
    return ((y * columns + x - frame) % factor).flatten(1)


def still(frames: int, height: int, width: int, factor: int) -> Tensor:
    """The lattice without a shift from frame to frame."""
    return lattice.residues(1, height, width, factor).expand(frames, -1)


@contextmanager
def pattern(residues: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the subset that destinations or kept patches form."""
    merging._build.cache_clear()
    pruning._build.cache_clear()
    with patch.object(merging, "residues", residues), patch.object(pruning, "residues", residues):
        yield
    merging._build.cache_clear()
    pruning._build.cache_clear()


@contextmanager
def features(compare: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace what of the queries ``[B, H, N, D]`` is compared when matching."""
    with patch.object(merging, "features", compare):
        yield


@contextmanager
def fitting(**constants: float) -> Iterator[None]:
    """Replace constants of the fit of linear unmerging."""
    with patch.multiple(unmerging, **constants):
        yield


@contextmanager
def by_head() -> Iterator[None]:
    """Fit a map of each head by itself, to the same pairs."""
    regress = unmerging.regress

    def each_alone(apart: Tensor, output_apart: Tensor, least: Tensor) -> Tensor:
        heads = zip(apart.chunk(HEADS, 2), output_apart.chunk(HEADS, 2), strict=True)
        return torch.block_diag(*(regress(*pair, least)[0] for pair in heads))[None]  # of one clip

    with patch.object(unmerging, "regress", each_alone):
        yield


@contextmanager
def random_pairs() -> Iterator[None]:
    """Fit to destinations paired at random and not with the most similar ones."""

    def drawn(source: Tensor, destination: Tensor, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = (*source.shape[:3], count)
        return torch.randint(destination.shape[2], shape, generator=generator)

    with patch.object(unmerging, "nearest", drawn):
        yield


def all_heads(query: Tensor) -> Tensor:
    return query.transpose(1, 2).flatten(2)


def first_head(query: Tensor) -> Tensor:
    return query[:, 0]


def random_projection(query: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    heads, dim = query.shape[1], query.shape[3]
    return all_heads(query) @ torch.randn(heads * dim, dim, generator=generator)


def variants() -> dict[str, tuple[str, Callable[[int], Schedule], Callable[[], object] | None]]:
    """Rows: name to (question, schedule of a factor, context)."""

    def queries(**changes: object) -> Callable[[int], Schedule]:
        return lambda r: Schedule.uniform(8, query=r, operators=Operators(**changes))

    def keys(**changes: object) -> Callable[[int], Schedule]:
        return lambda r: Schedule.uniform(8, key_value=r, operators=Operators(**changes))

    grid = {"key_value": "token_stride"}
    moved = {"unmerge": "linear"}
    return {
        "lattice, head mean, G = 20": ("query merging", queries(), None),
        "cells instead of the lattice": ("offsets", queries(), lambda: pattern(cells)),
        "no shift between frames": ("offsets", queries(), lambda: pattern(still)),
        "all heads": ("features", queries(), lambda: features(all_heads)),
        "first head": ("features", queries(), lambda: features(first_head)),
        "random projection to 32": ("features", queries(), lambda: features(random_projection)),
        "anchor frame stands aside": ("anchor", queries(merge_anchor=False), None),
        "G = 1": ("group", queries(group=1), None),
        "G = 4": ("group", queries(group=4), None),
        "G = 48": ("group", queries(group=48), None),
        "linear unmerging": ("unmerging", queries(**moved), None),
        "linear, each head by itself": ("fit", queries(**moved), by_head),
        "linear, random pairs": ("fit", queries(**moved), random_pairs),
        "linear, one partner": ("fit", queries(**moved), lambda: fitting(PARTNERS=1)),
        "linear, four partners": ("fit", queries(**moved), lambda: fitting(PARTNERS=4)),
        "linear, half the pairs": (
            "fit",
            queries(**moved),
            lambda: fitting(COMPARED_PER_FEATURE=2),
        ),
        "linear, twice the pairs": (
            "fit",
            queries(**moved),
            lambda: fitting(COMPARED_PER_FEATURE=8),
        ),
        "linear, ridge 0.01": ("fit", queries(**moved), lambda: fitting(RIDGE=0.01)),
        "linear, ridge 1": ("fit", queries(**moved), lambda: fitting(RIDGE=1.0)),
        "linear, G = 4": ("group", queries(**moved, group=4), None),
        "linear, G = 48": ("group", queries(**moved, group=48), None),
        "temporal stride": ("keys and values", keys(), None),
        "temporal stride, specials kept": ("specials", keys(keep_special=True), None),
        "token stride": ("keys and values", keys(**grid), None),
        "token stride, anchor kept": ("anchor", keys(**grid, keep_anchor=True), None),
        "token stride, anchor kept, beta 0.5": (
            "mass",
            keys(**grid, keep_anchor=True, mass_correction=0.5),
            None,
        ),
        "token stride, anchor kept, beta 1": (
            "mass",
            keys(**grid, keep_anchor=True, mass_correction=1.0),
            None,
        ),
        "the same, no shift between frames": (
            "offsets",
            keys(**grid, keep_anchor=True, mass_correction=1.0),
            lambda: pattern(still),
        ),
        "token stride, anchor and specials kept, beta 1": (
            "specials",
            keys(**grid, keep_special=True, keep_anchor=True, mass_correction=1.0),
            None,
        ),
    }


def errors(prediction: Prediction, clip: Clip) -> tuple[float, float, float]:
    """Rotation and translation direction (degrees) and median-aligned AbsRel per frame."""
    assert clip.depth is not None
    assert clip.extrinsics is not None
    pose = pose_metrics(prediction.extrinsics, clip.extrinsics)
    depth = depth_metrics(prediction.depth, clip.depth, align="frame")
    return pose.rotation_deg, pose.translation_deg, depth.abs_rel


def relative_error(prediction: Prediction, dense: Prediction, clip: Clip) -> float:
    """Return log of the geometric mean over the three errors of reduced ÷ dense."""
    pairs = zip(errors(prediction, clip), errors(dense, clip), strict=True)
    return statistics.fmean(math.log(max(a, 1e-6) / max(b, 1e-6)) for a, b in pairs)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=24, help="calibration clips (default: 24)")
    parser.add_argument("--factors", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--weights", default="shipped", help="as for spark3r.reference.load")
    parser.add_argument("--output", type=Path, help="write all rows as JSON")
    arguments = parser.parse_args()

    model = load(weights=arguments.weights)
    family = detect(model)
    assert family.predict is not None
    clips = [rendered_clip(seed, FRAMES) for seed in CALIBRATION[: arguments.clips]]

    def run(clip: Clip) -> Prediction:
        assert family.predict is not None
        with torch.inference_mode():
            return family.predict(model(clip.images), clip.images)

    dense = [run(clip) for clip in clips]
    rows = []
    print(f"{'':<46} {'r':>3}  log depth %  rotation deg  error vs dense %")
    for name, (question, schedule, context) in variants().items():
        for factor in arguments.factors:
            with ExitStack() as stack:
                if context is not None:
                    stack.enter_context(context())  # type: ignore[arg-type]
                stack.enter_context(spark3r.apply(model, schedule(factor)))
                reduced = [run(clip) for clip in clips]
            pairs = list(zip(reduced, dense, clips, strict=True))
            row = {
                "variant": name,
                "question": question,
                "factor": factor,
                "log_depth": mean_and_error(
                    [log_depth_deviation(r.depth, d.depth) for r, d, _ in pairs]
                ),
                "rotation_deg": mean_and_error(
                    [pose_metrics(r.extrinsics, d.extrinsics).rotation_deg for r, d, _ in pairs]
                ),
                "log_error_ratio": mean_and_error([relative_error(*pair) for pair in pairs]),
            }
            rows.append(row)
            depth, rotation, error = (
                row[k] for k in ("log_depth", "rotation_deg", "log_error_ratio")
            )
            print(
                f"{name:<46} {factor:>3}  {depth[0] * 100:5.2f} ± {depth[1] * 100:4.2f}  "
                f"{rotation[0]:5.2f} ± {rotation[1]:4.2f}  "
                f"{100 * math.expm1(error[0]):+6.1f} ± {100 * error[1]:4.1f}",
                flush=True,
            )
    if arguments.output:
        record = {
            "fingerprint": fingerprint(family.attention(model)),
            "frames": FRAMES,
            "clips": [clip.name for clip in clips],
            "rows": rows,
        }
        write_result(record, arguments.output)


if __name__ == "__main__":
    main()
