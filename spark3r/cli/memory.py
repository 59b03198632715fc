"""``spark3r memory``: the memory that a pass needs, and the longest clip that fits a card."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .arguments import (
    DTYPES,
    MODEL_HELP,
    add_json,
    parse_count,
    parse_grid,
    parse_size,
    parse_text,
)
from .tables import print_table

if TYPE_CHECKING:
    from ..families.base import Family
    from ..memory_count import MemoryCount

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_memory(commands: Subparsers) -> None:
    """Declare ``spark3r memory``."""
    command = commands.add_parser(
        "memory",
        help="count the memory of a pass, without a GPU and without weights",
        description="Count the memory that one pass needs at its peak, by part. The model runs on "
        "shapes alone, so this needs no GPU, no weights and little memory.",
        allow_abbrev=False,
    )
    command.add_argument("model", type=parse_text, metavar="MODEL", help=MODEL_HELP)
    command.add_argument(
        "--frames", type=parse_count, required=True, metavar="N", help="length of the clip"
    )
    command.add_argument(
        "--size",
        type=parse_grid,
        metavar="HxW",
        help="height and width of the images in pixels (default: what the model makes of 4:3 "
        "footage)",
    )
    command.add_argument(
        "--profile",
        type=parse_text,
        metavar="P",
        help="a shipped profile or a file; its default schedule is followed (default: dense)",
    )
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="precision of the pass, by autocast as on CUDA (default: bfloat16)",
    )
    command.add_argument(
        "--card",
        type=parse_size,
        metavar="SIZE",
        help="memory of a card, such as 24GB or 22.5GiB; prints the longest clip that fits it",
    )
    add_json(command)
    command.set_defaults(run=_memory)


def _memory(options: argparse.Namespace) -> int:
    import torch

    from ..fitting import most_frames
    from ..loading.architecture import load_architecture
    from ..memory_count import count_memory
    from ..profile import load_profile
    from ..runner import Runner

    schedule = load_profile(options.profile).schedule() if options.profile else None
    runner = Runner.of(load_architecture(options.model))
    size = options.size or _usual_size(runner.family)
    dtype = getattr(torch, options.dtype)

    def count(frames: int) -> MemoryCount:
        return count_memory(
            runner.root, frames, size, schedule=schedule, dtype=dtype, family=runner.family
        )

    found = count(options.frames)
    known = {options.frames: found.total}

    def total(frames: int) -> int:
        return known[frames] if frames in known else count(frames).total

    longest = None if options.card is None else most_frames(total, options.card, options.frames)
    if options.json:
        print(json.dumps(_json(options, size, found, longest), indent=2))
    else:
        _print(options, size, found, longest)
    return 0


def _print(
    options: argparse.Namespace, size: tuple[int, int], found: MemoryCount, longest: int | None
) -> None:
    how = "dense" if options.profile is None else f"profile {options.profile}"
    print(
        f"{options.model}, {found.frames} frames of {size[1]}x{size[0]} pixels, {how}, "
        f"{options.dtype}\n"
    )
    rows = [(part, _gb(size)) for part, size in found.parts.items()]
    print_table(("part", "GB"), [*rows, ("total", _gb(found.total))])
    print(f"\nThe peak is in {found.where or 'the model itself'}.")
    if longest is not None:
        print(f"{_gb(options.card)} GB hold {longest} frames.")
    print("Counted and not measured: the CUDA context (some .5 GB) and fragmentation come on top.")


def _json(
    options: argparse.Namespace, size: tuple[int, int], found: MemoryCount, longest: int | None
) -> dict[str, Any]:
    return {
        "model": options.model,
        "profile": options.profile,
        "frames": found.frames,
        "height": size[0],
        "width": size[1],
        "dtype": options.dtype,
        "bytes": found.total,
        "parts": found.parts,
        "peak_in": found.where,
        "card_bytes": options.card,
        "most_frames": longest,
    }


def _usual_size(family: Family) -> tuple[int, int]:
    """Return height and width that a family's preprocessing makes of 4:3 footage."""
    from PIL import Image

    from ..errors import Spark3rError

    if family.preprocess is None:
        raise Spark3rError(f"family '{family.name}' knows no size of images: give --size HxW")
    height, width = family.preprocess([Image.new("RGB", (640, 480))]).images.shape[2:]
    return int(height), int(width)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"
