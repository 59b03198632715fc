"""Choices that the paper leaves open about its operators, measured on the reference model.

    python benchmarks/operators.py [--clips 24] [--output benchmarks/results/operators.json]

Each row changes one thing about query merging or key-value pruning in all layers, on the same
rendered calibration clips. It reports the deviation from the dense run (log depth after one median
scale per clip, relative rotation) and the error against ground truth relative to the dense run's
(geometric mean of rotation, translation direction and aligned AbsRel). Figures are means over clips
with their standard errors. Deviation and error disagree, so the table shows both.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results_io import write_result
from torch import Tensor

import spark3r
from spark3r import (
    Clip,
    Operators,
    Prediction,
    QueryMerging,
    Schedule,
    TemporalStride,
    TokenLayout,
    TokenStride,
)
from spark3r.identity import fingerprint
from spark3r.metrics import depth_metrics, log_depth_deviation, pose_metrics
from spark3r.reduction import lattice, unmerging
from spark3r.reduction.merging import MergePlan
from spark3r.reduction.operators import UNMERGINGS, KeyValuePruning, LinearUnmerging
from spark3r.reference import load
from spark3r.reference.scenes.render import rendered_clip
from spark3r.reference.scenes.seeds import CALIBRATION
from spark3r.runner import Runner

FRAMES = 48
LAYERS = 8


def cells(frames: int, height: int, width: int, factor: int) -> Tensor:
    """Return residues that cycle inside rectangular cells, as region sampling for images does."""
    rows = max(a for a in range(1, math.isqrt(factor) + 1) if factor % a == 0)
    columns = factor // rows
    y = torch.arange(height).view(1, -1, 1) % rows
    x = torch.arange(width).view(1, 1, -1) % columns
    frame = torch.arange(frames).view(-1, 1, 1)
    return ((y * columns + x - frame) % factor).flatten(1)


def still(frames: int, height: int, width: int, factor: int) -> Tensor:
    """Return the residues of the lattice without the shift from frame to frame."""
    return lattice.residues(1, height, width, factor).expand(frames, -1)


def all_heads(query: Tensor) -> Tensor:
    """Return the queries of all heads side by side, ``[B, N, H * D]``."""
    return query.transpose(1, 2).flatten(2)


def first_head(query: Tensor) -> Tensor:
    """Return the queries of the first head, ``[B, N, D]``."""
    return query[:, 0]


def random_projection(query: Tensor) -> Tensor:
    """Return a random projection of the queries of all heads, ``[B, N, D]``."""
    generator = torch.Generator().manual_seed(0)
    heads, dim = query.shape[1], query.shape[3]
    return all_heads(query) @ torch.randn(heads * dim, dim, generator=generator)


class CellMerging(QueryMerging):
    """Query merging with destinations in rectangular cells instead of the lattice."""

    def destinations(self, frames: int, height: int, width: int, factor: int) -> Tensor:
        """Return one patch of every cell."""
        return cells(frames, height, width, factor) == 0


class StillMerging(QueryMerging):
    """Query merging with the same destinations in every frame."""

    def destinations(self, frames: int, height: int, width: int, factor: int) -> Tensor:
        """Return the patches of the lattice without its shift."""
        return still(frames, height, width, factor) == 0


class AllHeadsMerging(QueryMerging):
    """Query merging that compares all heads."""

    def features(self, query: Tensor) -> Tensor:
        """Return all heads side by side."""
        return all_heads(query)


class FirstHeadMerging(QueryMerging):
    """Query merging that compares the first head only."""

    def features(self, query: Tensor) -> Tensor:
        """Return the first head."""
        return first_head(query)


class ProjectionMerging(QueryMerging):
    """Query merging that compares a random projection of all heads."""

    def features(self, query: Tensor) -> Tensor:
        """Return the projection."""
        return random_projection(query)


class StillTokenStride(TokenStride):
    """Token stride that keeps the same patches of every frame."""

    def kept_patches(self, layout: TokenLayout, factor: int) -> Tensor:
        """Return the patches of the lattice without its shift."""
        return still(layout.frames, layout.height, layout.width, factor) == 0

    def kept_per_frame(self, layout: TokenLayout, factor: int) -> Tensor:
        """Return how many patches of each frame stay."""
        return self.kept_patches(layout, factor).sum(dim=1)


@dataclass(frozen=True)
class HeadwiseUnmerging(LinearUnmerging):
    """Linear unmerging with one map per head, fitted to the same pairs."""

    def fit(self, merged: Tensor, output: Tensor, plan: MergePlan) -> Tensor:
        """Return the maps of the heads as one block-diagonal map, for a single clip."""
        pairs = unmerging.similar_pairs(merged, plan, self.compared_per_feature, self.partners)
        heads = zip(merged.split(1, 1), output.split(1, 1), strict=True)
        maps = [unmerging.fit(*head, *pairs, self.ridge) for head in heads]
        return torch.block_diag(*(each[0] for each in maps))[None]


@dataclass(frozen=True)
class RandomPairsUnmerging(LinearUnmerging):
    """Linear unmerging fitted to random pairs of a group instead of similar ones."""

    def fit(self, merged: Tensor, output: Tensor, plan: MergePlan) -> Tensor:
        """Return the map, see `LinearUnmerging.fit`."""
        one, other = unmerging.similar_pairs(merged, plan, self.compared_per_feature, self.partners)
        generator = torch.Generator().manual_seed(0)
        for block in plan.blocks:
            first, count = block.first_destination, block.destinations
            inside = (one >= first) & (one < first + block.groups * count)
            group = first + (one - first) // count * count
            drawn = group + torch.randint(count, one.shape, generator=generator)
            other = torch.where(inside, drawn, other)
        return unmerging.fit(merged, output, one, other, self.ridge)


UNMERGING_VARIANTS = {
    "each head by itself": HeadwiseUnmerging(),
    "random pairs": RandomPairsUnmerging(),
    "one partner": LinearUnmerging(partners=1),
    "four partners": LinearUnmerging(partners=4),
    "half the pairs": LinearUnmerging(compared_per_feature=2),
    "twice the pairs": LinearUnmerging(compared_per_feature=8),
    "ridge 0.01": LinearUnmerging(ridge=0.01),
    "ridge 1": LinearUnmerging(ridge=1.0),
}


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        question: The choice that it is about.
        schedule: Function from the factor to the schedule.
    """

    question: str
    schedule: Callable[[int], Schedule]


def queries(question: str, merging: QueryMerging) -> Variant:
    """Return a variant that merges queries."""
    operators = Operators(query=merging)
    return Variant(question, lambda r: Schedule.uniform(LAYERS, query=r, operators=operators))


def keys(question: str, pruning: KeyValuePruning) -> Variant:
    """Return a variant that prunes keys and values."""
    operators = Operators(key_value=pruning)
    return Variant(question, lambda r: Schedule.uniform(LAYERS, key_value=r, operators=operators))


def variants() -> dict[str, Variant]:
    """Return all rows by name."""
    UNMERGINGS.update(UNMERGING_VARIANTS)
    return {
        "lattice, head mean, G = 20": queries("query merging", QueryMerging()),
        "cells instead of the lattice": queries("offsets", CellMerging()),
        "no shift between frames": queries("offsets", StillMerging()),
        "all heads": queries("features", AllHeadsMerging()),
        "first head": queries("features", FirstHeadMerging()),
        "random projection to 32": queries("features", ProjectionMerging()),
        "anchor frame stands aside": queries("anchor", QueryMerging(merge_anchor=False)),
        "G = 1": queries("group", QueryMerging(group=1)),
        "G = 4": queries("group", QueryMerging(group=4)),
        "G = 48": queries("group", QueryMerging(group=48)),
        "linear unmerging": queries("unmerging", QueryMerging(unmerge="linear")),
        **{
            f"linear, {name}": queries("fit", QueryMerging(unmerge=name))
            for name in UNMERGING_VARIANTS
        },
        "linear, G = 4": queries("group", QueryMerging(unmerge="linear", group=4)),
        "linear, G = 48": queries("group", QueryMerging(unmerge="linear", group=48)),
        "temporal stride": keys("keys and values", TemporalStride()),
        "temporal stride, specials kept": keys("specials", TemporalStride(keep_special=True)),
        "token stride": keys("keys and values", TokenStride()),
        "token stride, anchor kept": keys("anchor", TokenStride(keep_anchor=True)),
        "token stride, anchor kept, beta 0.5": keys(
            "mass", TokenStride(keep_anchor=True, mass_correction=0.5)
        ),
        "token stride, anchor kept, beta 1": keys(
            "mass", TokenStride(keep_anchor=True, mass_correction=1.0)
        ),
        "the same, no shift between frames": keys(
            "offsets", StillTokenStride(keep_anchor=True, mass_correction=1.0)
        ),
        "token stride, anchor and specials kept, beta 1": keys(
            "specials", TokenStride(keep_special=True, keep_anchor=True, mass_correction=1.0)
        ),
    }


def errors(prediction: Prediction, clip: Clip) -> tuple[float, float, float]:
    """Return rotation and translation errors (degrees) and AbsRel aligned by frame."""
    assert clip.depth is not None
    assert clip.extrinsics is not None
    pose = pose_metrics(prediction.extrinsics, clip.extrinsics)
    depth = depth_metrics(prediction.depth, clip.depth, align="frame")
    return pose.rotation_deg, pose.translation_deg, depth.abs_rel


def relative_error(prediction: Prediction, dense: Prediction, clip: Clip) -> float:
    """Return the mean over the three errors of log (reduced ÷ dense)."""
    pairs = zip(errors(prediction, clip), errors(dense, clip), strict=True)
    return statistics.fmean(math.log(max(a, 1e-6) / max(b, 1e-6)) for a, b in pairs)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=24, help="calibration clips (default: 24)")
    parser.add_argument("--factors", type=int, nargs="+", default=[4, 8], help="default: 4 8")
    parser.add_argument("--weights", default="shipped", help="as for spark3r.reference.load")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    runner = Runner.of(load(weights=arguments.weights))
    clips = [rendered_clip(seed, FRAMES) for seed in CALIBRATION[: arguments.clips]]
    dense = [runner.predict(clip) for clip in clips]
    rows: list[dict[str, Any]] = []
    print(f"{'':<46} {'r':>3}  log depth %  rotation deg  error vs dense %")
    for name, variant in variants().items():
        for factor in arguments.factors:
            with spark3r.apply(runner.model, variant.schedule(factor)):
                reduced = [runner.predict(clip) for clip in clips]
            pairs = list(zip(reduced, dense, clips, strict=True))
            depth = mean_and_error([log_depth_deviation(r.depth, d.depth) for r, d, _ in pairs])
            rotation = mean_and_error(
                [pose_metrics(r.extrinsics, d.extrinsics).rotation_deg for r, d, _ in pairs]
            )
            error = mean_and_error([relative_error(*pair) for pair in pairs])
            rows.append(
                {
                    "variant": name,
                    "question": variant.question,
                    "factor": factor,
                    "log_depth": depth,
                    "rotation_deg": rotation,
                    "log_error_ratio": error,
                }
            )
            print(
                f"{name:<46} {factor:>3}  {depth[0] * 100:5.2f} ± {depth[1] * 100:4.2f}  "
                f"{rotation[0]:5.2f} ± {rotation[1]:4.2f}  "
                f"{100 * math.expm1(error[0]):+6.1f} ± {100 * error[1]:4.1f}",
                flush=True,
            )
    if arguments.output:
        record = {
            "fingerprint": fingerprint(runner.attention),
            "frames": FRAMES,
            "clips": [clip.name for clip in clips],
            "rows": rows,
        }
        write_result(record, arguments.output)


if __name__ == "__main__":
    main()
