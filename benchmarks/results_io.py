"""How results are written: what ran, when and where stand before the figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from spark3r.env import environment


def write_result(document: Mapping[str, Any], output: Path | None) -> None:
    """Write what a script measured as JSON, with its command, the day and the environment.

    Args:
        document: What was measured.
        output: The file, whose folder is made; None prints it.
    """
    record = {
        "command": "python " + " ".join(sys.argv),
        "date": date.today().isoformat(),
        "environment": environment(),
        **document,
    }
    text = json.dumps(record, indent=2) + "\n"
    if output is None:
        print(text, end="")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
