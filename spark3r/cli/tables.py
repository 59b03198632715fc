"""Tables on stdout: drawn on a terminal; plain and never truncated in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

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
    right = [all(NUMERIC.issuperset(row[i]) for row in rows) for i in range(len(columns))]
    if sys.stdout.isatty():
        _draw(columns, rows, right, styles or {})
    else:
        _print_plain(columns, rows, right)


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

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column, numeric in zip(columns, right, strict=True):
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    Console().print(drawn)


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
