"""The origins of a reconstruction as lines of text, for files that hold comments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

LONGEST = 900
"""Longest line. Widespread readers of PLY files take up to 1024 bytes."""


def provenance_lines(record: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield one line of ASCII for each value of a record that is known: ``weights.sha256 "…"``.

    Args:
        record: The record, as ``run.json`` holds it.
        prefix: Names of the objects that the record is in, each with a dot after it.
    """
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from provenance_lines(value, f"{prefix}{key}.")
        elif value is not None:
            line = f"{prefix}{key} {json.dumps(value)}"
            yield line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
