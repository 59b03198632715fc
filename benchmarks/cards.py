"""Estimated seconds and counted memory of VGGT-1B on several GPUs. Nothing here was run on one.

    python benchmarks/cards.py --code VGGT --output benchmarks/results/cards.json

VGGT is a clone of the model's code, or nothing if it is installed. Memory is counted by
`spark3r.memory_count`, which takes some minutes: the length of a card's row is the largest round
one that fits, up to the length that the row asks for.

A part of a pass takes the longer way of a card through it: its arithmetic at a share of the data
sheet's peak, and the bytes that it moves at a share of the bandwidth, one after the other. The
arithmetic is counted from the architecture, the bytes from the tensors that upstream's code makes
in bfloat16 autocast (traced, not run). One published figure checks it: VGGT's README gives 3.12 s
for the aggregator of 100 frames on one H100, dense.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from results_io import print_markdown, write_result

from spark3r import TokenLayout, load_profile
from spark3r.fitting import most_frames
from spark3r.loading.architecture import load_architecture
from spark3r.memory_count import count_memory
from spark3r.reduction.attention import attention_share

WIDTH, LAYERS = 1024, 24
GRID, SPECIAL = (28, 37), 5  # 518x392 pixels in patches of 14
TOKENS = GRID[0] * GRID[1] + SPECIAL  # of a frame, in the encoder too

LINEAR = WIDTH**2 * TOKENS * LAYERS / 1e12  # TFLOP of a frame per unit of C² and token
WITHIN_FRAME = 4 * WIDTH * TOKENS**2 * LAYERS / 1e12


@dataclass(frozen=True)
class Part:
    """Work of one part of a pass, per frame.

    Attributes:
        name: Name of the part.
        half: TFLOP of matrix products in half precision.
        attention: TFLOP of attention inside a frame.
        tf32: TFLOP of convolutions in TF32.
        single: TFLOP in float32.
        gb: GB that it reads and writes.
        reduced_only: Whether a dense pass lacks it.
        aggregator: Whether the aggregator has it.
    """

    name: str
    half: float = 0.0
    attention: float = 0.0
    tf32: float = 0.0
    single: float = 0.0
    gb: float = 0.0
    reduced_only: bool = False
    aggregator: bool = True


PARTS = (
    Part("encoder", half=24 * LINEAR, attention=WITHIN_FRAME, gb=2.3),
    Part("frame blocks", half=24 * LINEAR, attention=WITHIN_FRAME, gb=6.7),
    Part("MLPs of global blocks", half=16 * LINEAR, gb=0.65),
    Part("their norms and residuals", gb=1.35),
    Part("their projections", half=4 * LINEAR, gb=0.16),
    Part("query and key norm, rotary embedding", gb=2.0),
    Part("matching", single=0.0122, gb=0.54, reduced_only=True),
    Part("merging, unmerging", gb=0.4, reduced_only=True),
    Part("depth head", tf32=0.226, aggregator=False),
    Part("camera head, other", gb=0.25, aggregator=False),
)
"""The point head, another .226 TFLOP, runs only where users call the model themselves."""


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: dense TFLOP/s, TB/s and GB of memory, and the longest clip shown."""

    name: str
    half: float
    tf32: float
    single: float
    bandwidth: float
    memory: int
    frames: int


CARDS = (
    Card("RTX 4090", 165, 83, 83, 1.01, 24, 1000),
    Card("L40S", 362, 183, 92, 0.86, 48, 1000),
    Card("A100 80 GB", 312, 156, 19.5, 2.04, 80, 1000),
    Card("H100 80 GB", 989, 495, 67, 3.35, 80, 1000),
    Card("H200", 989, 495, 67, 4.80, 141, 1000),
    Card("H200", 989, 495, 67, 4.80, 141, 4000),
)
# Shares of the data sheet that large kernels reach on Hopper.
OF_HALF, OF_ATTENTION, OF_TF32, OF_SINGLE, OF_BANDWIDTH = 0.61, 0.56, 0.35, 0.67, 0.75

CONTEXT_GB = 0.5
"""Memory that the CUDA context takes, which is not counted."""


def memory_counter() -> Callable[[int], int]:
    """Return the function from a number of frames to the bytes that a reduced pass needs."""
    model, schedule = load_architecture("vggt:random"), load_profile("vggt-1b").schedule()

    @cache
    def count(frames: int) -> int:
        size = (14 * GRID[0], 14 * GRID[1])
        return count_memory(model, frames, size, schedule=schedule, dtype=torch.bfloat16).total

    return count


def frames_on(card: Card, count: Callable[[int], int]) -> int:
    """Return the length of a card's row: the one asked for, or the largest round one that fits."""
    room = int(1e9 * (card.memory - CONTEXT_GB))
    if count(card.frames) <= room:
        return card.frames
    guess = card.frames * room // count(card.frames)
    return most_frames(count, room, guess) // 10 * 10


def global_attention(frames: int, reduced: bool) -> float:
    """Return the TFLOP of all global attention products under the paper's schedule, or dense."""
    layout = TokenLayout(frames, *GRID, special=SPECIAL, anchor_frame=0)
    share = 1.0
    if reduced:
        share = attention_share(load_profile("vggt-1b").schedule().resolve_within(layout), layout)
    return share * 4 * WIDTH * layout.tokens**2 * LAYERS / 1e12


def seconds(card: Card, frames: int, reduced: bool, aggregator_only: bool = False) -> float:
    """Return the estimated seconds of a pass that predicts, without the point head."""
    total = global_attention(frames, reduced) / (OF_ATTENTION * card.half)
    for part in PARTS:
        if (part.reduced_only and not reduced) or (aggregator_only and not part.aggregator):
            continue
        total += frames * (
            part.half / (OF_HALF * card.half)
            + part.attention / (OF_ATTENTION * card.half)
            + part.tf32 / (OF_TF32 * card.tf32)
            + part.single / (OF_SINGLE * card.single)
            + part.gb / (OF_BANDWIDTH * card.bandwidth * 1e3)
        )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--code", type=Path, help="folder of VGGT's code, if it is not installed")
    parser.add_argument("--output", type=Path, help="JSON file to write; by default it is printed")
    options = parser.parse_args()
    if options.code is not None:
        sys.path.append(str(options.code))
    count = memory_counter()
    rows: list[dict[str, Any]] = []
    for card in CARDS:
        frames = frames_on(card, count)
        rows.append(
            {
                "card": card.name,
                "memory_gb": card.memory,
                "frames": frames,
                "counted_gb": round(count(frames) / 1e9, 1),
                "reduced_s": round(seconds(card, frames, True), 1),
                "dense_s": round(seconds(card, frames, False), 1),
            }
        )
    h100 = next(card for card in CARDS if card.name.startswith("H100"))
    check = {"published_s": 3.12, "estimated_s": round(seconds(h100, 100, False, True), 2)}
    if options.output is not None:
        print_markdown(
            ("card", "frames", "GB, counted", "reduced, estimated", "dense, estimated"),
            [
                (
                    f"{row['card'].removesuffix(' 80 GB')}, {row['memory_gb']} GB",
                    f"{row['frames']:,}",
                    row["counted_gb"],
                    f"{row['reduced_s']:.0f} s",
                    f"{row['dense_s']:.0f} s",
                )
                for row in rows
            ],
        )
        print(f"aggregator of 100 frames on an H100, dense: {check}")
    write_result({"status": "estimated", "rows": rows, "check": check}, options.output)


if __name__ == "__main__":
    main()
