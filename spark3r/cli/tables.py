"""Tables on stdout: drawn on a terminal; plain and never truncated in a pipe."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence

from ..errors import printable

NUMERIC = frozenset("0123456789.,-%°")


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    styles: Mapping[str, str] | None = None,
) -> None:
    """Print rows under column heads, with columns of numbers aligned to the right.

    Args:
        columns: Column heads.
        rows: Rows of texts, one text per column.
        styles: Styles of cells on a terminal by their text; None for none.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    right = [all(NUMERIC.issuperset(row[i]) for row in rows) for i in range(len(columns))]
    if sys.stdout.isatty():
        _draw(columns, rows, right, styles or {})
    else:
        _print_plain(columns, rows, right)


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text, such as ``0-10, 17``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def folded_names(names: Sequence[str]) -> str:
    """Return names that differ in one number as text, such as ``blocks.{0-10, 17}.attn``.

    Of other names the first is returned, and how many follow.
    """
    split = [re.split(r"([0-9]+)", name) for name in names]  # numbers have odd places
    differing = [
        place for place, parts in enumerate(zip(*split, strict=False)) if len(set(parts)) > 1
    ]
    if not differing and len({*names}) == 1:
        return names[0]
    if len(differing) != 1 or differing[0] % 2 == 0 or len({len(parts) for parts in split}) > 1:
        return f"{names[0]} and {len(names) - 1} more"
    (place,) = differing
    numbers = ranges([int(parts[place]) for parts in split])
    return "".join([*split[0][:place], f"{{{numbers}}}", *split[0][place + 1 :]])


def _draw(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[bool],
    styles: Mapping[str, str],
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    cells = [max((len(row[place]) for row in rows), default=0) for place in range(len(columns))]
    natural = [max(pair) for pair in zip(cells, map(len, columns), strict=True)]
    # Where a table is too wide, heads of numbers break between words, and texts fold. Numbers stay
    # whole, because half a number is another number.
    whole = [max(cell, *map(len, head.split())) for cell, head in zip(cells, columns, strict=True)]
    too_wide = sum(natural) + 2 * len(columns) > console.width
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for head, numeric, width in zip(columns, right, whole, strict=True):
        drawn.add_column(
            head,
            justify="right" if numeric else "left",
            overflow="fold",
            width=width if numeric and too_wide else None,
        )
    for row in rows:
        drawn.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    console.print(drawn)


def _print_plain(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]
) -> None:
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    for line in (columns, *rows):
        cells = [
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(line, widths, right, strict=True)
        ]
        print("  ".join(cells).rstrip())
