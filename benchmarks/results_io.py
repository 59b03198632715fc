"""Results of the scripts: a JSON file that names its command, day and environment; tables."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from spark3r.env import environment

RESULTS = Path(__file__).parent / "results"
"""Folder of the committed results."""


def provenance() -> dict[str, Any]:
    """Return the command that runs, the day and the environment."""
    return {
        "command": "python " + " ".join(sys.argv),
        "date": date.today().isoformat(),
        "environment": environment(),
    }


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def store_json(path: Path, document: Any) -> None:
    """Write a JSON file of raw figures atomically."""
    replace_file(path, json.dumps(document, indent=1).encode())


def write_result(document: Mapping[str, Any], output: Path | None) -> None:
    """Write a script's result as JSON, preceded by its command, the day and the environment.

    Args:
        document: The result.
        output: The file to write; its folder is created. None prints the JSON.
    """
    text = json.dumps(provenance() | dict(document), indent=2) + "\n"
    if output is None:
        print(text, end="")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")


def print_markdown(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table."""
    for cells in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(map(str, cells))} |")
