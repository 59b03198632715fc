"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import Spark3rError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
"""Choices of ``--dtype``, the precision of a pass by autocast."""


class UsageError(Spark3rError):
    """A command of which a part is missing; the exit status is 2."""


def add_dtype(command: argparse._ActionsContainer) -> None:
    """Declare ``--dtype``, which `chosen_dtype` reads."""
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        help="precision of the passes, by autocast; float32 for none "
        "(default: bfloat16 on CUDA, or float16 on cards that lack it; float32 elsewhere)",
    )


def chosen_dtype(options: argparse.Namespace, device: str) -> torch.dtype:
    """Return the precision that ``--dtype`` names, or the default on a device."""
    import torch

    from ..runner import default_dtype

    dtype: torch.dtype = (
        default_dtype(device) if options.dtype is None else getattr(torch, options.dtype)
    )
    return dtype


def add_profile(command: argparse.ArgumentParser) -> None:
    """Declare PROFILE."""
    command.add_argument(
        "profile",
        metavar="PROFILE",
        help="name of a shipped profile, or a file (a path, or a name that ends in .json)",
    )


MODEL_HELP = (
    "reference, reference:random, FAMILY:WEIGHTS or FAMILY:random with vggt, pi3, da3 or omega "
    "(weights are a file, or a name on Hugging Face with or without @REVISION), or "
    "package.module:factory"
)


def add_model(command: argparse.ArgumentParser, default: str | None = None, also: str = "") -> None:
    """Declare ``--model``, and say ``also`` in its help."""
    shown = "" if default is None else f" (default: {default})"
    command.add_argument("--model", default=default, metavar="NAME", help=MODEL_HELP + also + shown)


def add_json(command: argparse.ArgumentParser) -> None:
    """Declare ``--json``."""
    command.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )


def parse_count(text: str) -> int:
    """Return an integer of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}', expected an integer of at least 1")
    return int(text)


def parse_grid(text: str) -> tuple[int, int]:
    """Return rows and columns from a text such as ``28x37``."""
    rows, cross, columns = text.partition("x")
    try:
        if cross:
            return parse_count(rows), parse_count(columns)
    except argparse.ArgumentTypeError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}', expected rows x columns such as 28x37")


def grid_text(grid: tuple[int, int]) -> str:
    """Return the text of rows and columns, such as ``28x37``."""
    return f"{grid[0]}x{grid[1]}"
