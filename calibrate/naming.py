"""What operators are called: as tables hold them, and as people read them."""

from __future__ import annotations

import json
from dataclasses import asdict

from spark3r.schedule import Operators


def operators_text(operators: Operators) -> str:
    """Return operators as tables hold them: JSON with sorted keys."""
    return json.dumps(asdict(operators), sort_keys=True)


def operators_name(operators: Operators) -> str:
    """Return what people call operators, such as ``token stride + anchor, β 1, linear``."""
    name = operators.key_value.replace("_", " ") + " + anchor" * operators.keep_anchor
    name += f", β {operators.mass_correction:g}" if operators.mass_correction else ""
    return name + (", linear" if operators.unmerge == "linear" else "")
