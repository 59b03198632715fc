"""The options of a command that say which part of footage frames are taken from."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from .arguments import parse_count

if TYPE_CHECKING:
    from ..io.frames import Stretch


def add_stretch(command: argparse._ActionsContainer) -> None:
    """Declare ``--start``, ``--end`` and ``--every``."""
    command.add_argument(
        "--start",
        type=_time,
        default=0.0,
        metavar="T",
        help="first second of a video, or number of the first image of a folder (default: 0)",
    )
    command.add_argument(
        "--end",
        type=_time,
        metavar="T",
        help="second of a video, or number of an image, at which to stop (default: the end)",
    )
    command.add_argument(
        "--every",
        type=parse_count,
        default=1,
        metavar="N",
        help="take every Nth frame; --frames then spreads over those (default: 1)",
    )


def stretch_of(options: argparse.Namespace) -> Stretch:
    """Return the stretch that the options name."""
    from ..io.frames import Stretch

    return Stretch(options.start, options.end, options.every)


def _time(text: str) -> float:
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}', expected seconds such as 12.5")
    return seconds
