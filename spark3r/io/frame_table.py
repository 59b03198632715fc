"""``quality.csv``: the figures of every frame, and what is suspicious about it."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..errors import printable
from ..metrics import FrameFigures

__all__ = ["FRAME_TABLE", "write_frame_table"]

FRAME_TABLE = "quality.csv"


def write_frame_table(
    path: Path,
    names: Sequence[str],
    figures: FrameFigures,
    suspected: Sequence[tuple[str, ...]],
) -> None:
    """Write a row per frame: number, name, its `FrameFigures`, and its suspicions.

    A figure that is not known is empty.

    Args:
        path: The file.
        names: Name of each frame; what cannot be printed is escaped.
        figures: The figures.
        suspected: What is suspicious about each frame, in words.
    """
    columns = [field.name for field in fields(FrameFigures)]
    values = zip(*(getattr(figures, name).tolist() for name in columns), strict=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["frame", "name", *columns, "suspected"])
        for number, (name, row, words) in enumerate(zip(names, values, suspected, strict=True)):
            known = ["" if math.isnan(value) else f"{value:.6g}" for value in row]
            table.writerow([number, printable(name), *known, " ".join(words)])
