"""How the scripts of this folder begin and end: common options, the result, faults and status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from results_io import write_result

MOST_PRINTED = 20
"""Faults that are printed. The result has more of them."""


def outcome_parser(description: str, share: str, *, seed: str = "") -> argparse.ArgumentParser:
    """Return a parser of the options that all scripts have.

    Args:
        description: What the script does.
        share: What ``--share`` is a share of.
        seed: What ``--seed`` chooses; without it there is no such option.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--share", type=float, default=1.0, help=f"share of {share} (default: 1)")
    if seed:
        parser.add_argument("--seed", type=int, default=0, help=f"seed of {seed} (default: 0)")
    parser.add_argument("--output", type=Path, help="JSON file to write; by default it is printed")
    return parser


def finish(result: Mapping[str, Any], faults: Sequence[object], output: Path | None) -> int:
    """Write a result, print its faults to the standard error, and return the exit status."""
    write_result(result, output)
    for fault in faults[:MOST_PRINTED]:
        print(fault, file=sys.stderr)
    if len(faults) > MOST_PRINTED:
        print(f"... and {len(faults) - MOST_PRINTED} more", file=sys.stderr)
    return 1 if faults else 0
