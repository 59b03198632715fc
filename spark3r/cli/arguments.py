"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Spark3rError, first_line

if TYPE_CHECKING:
    import torch

    from ..families.base import Family

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


def chosen_model(options: argparse.Namespace, clips: Sequence[str], family: str | None) -> str:
    """Return the model that ``--model`` names, or the reference model for rendered scenes.

    Args:
        options: The options; ``model`` is None without ``--model``.
        clips: The footage.
        family: Family of the profile that is applied; None without one.

    Raises:
        UsageError: If there is no ``--model`` and one of the clips is real footage.
    """
    if options.model is not None:
        return str(options.model)
    real = [clip for clip in clips if is_real(clip)]
    if not real:
        return "reference"
    from ..loading.load import offered

    raise UsageError(
        f"--clip {real[0]} is real footage, so say with --model which model is to see it:\n"
        + offered(family)
    )


def is_real(clip: str) -> bool:
    """Return True for real footage, False for a scene that spark3r renders."""
    return not clip.startswith("rendered:")


def parse_text(text: str) -> str:
    """Return a text, which an unset variable of the shell would leave empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"'{text}' is empty")
    return text


def parse_path(text: str) -> Path:
    """Return a path that is not empty: an empty one would be the present folder."""
    return Path(parse_text(text))


def usable_device(name: str) -> str:
    """Return the name of a device that torch can compute on.

    Raises:
        Spark3rError: If it cannot be used here.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Spark3rError(f"device '{name}' cannot be used: {first_line(error)}") from error
    if device.type == "meta":
        raise Spark3rError("device 'meta' computes nothing: use cpu or cuda")
    return name


def default_device() -> str:
    """Return ``cuda`` where there is one, and ``cpu`` elsewhere."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def add_profile(command: argparse.ArgumentParser) -> None:
    """Declare PROFILE."""
    command.add_argument(
        "profile",
        type=parse_text,
        metavar="PROFILE",
        help="name of a shipped profile, or a file (a path, or a name that ends in .json)",
    )


MODEL_HELP = (
    "reference, reference:random, FAMILY:WEIGHTS or FAMILY:random with vggt, pi3, da3, omega, "
    "mapanything, worldmirror or panovggt (weights are a file, or a name on Hugging Face with or "
    "without @REVISION), or package.module:factory"
)


def add_model(
    command: argparse._ActionsContainer, default: str | None = None, also: str = ""
) -> None:
    """Declare ``--model``, and say ``also`` in its help."""
    shown = "" if default is None else f" (default: {default})"
    command.add_argument(
        "--model",
        type=parse_text,
        default=default,
        metavar="NAME",
        help=MODEL_HELP + also + shown,
    )


def add_family(command: argparse._ActionsContainer) -> None:
    """Declare ``--family``, which `chosen_family` reads."""
    command.add_argument(
        "--family",
        type=parse_text,
        metavar="NAME",
        help="family of the model, or a file that ends in .toml and describes where its attention "
        "is and how its tokens lie (default: recognised by structure)",
    )


def chosen_family(options: argparse.Namespace) -> Family | None:
    """Return the family that ``--family`` names, None without it.

    Raises:
        FamilyError: If there is no such family, or the file does not describe one.
    """
    if options.family is None:
        return None
    from ..families.description import family_of

    return family_of(options.family)


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


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``24GB``."""
    from ..fitting import bytes_of

    try:
        return bytes_of(text)
    except Spark3rError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def grid_text(grid: tuple[int, int]) -> str:
    """Return the text of rows and columns, such as ``28x37``."""
    return f"{grid[0]}x{grid[1]}"
