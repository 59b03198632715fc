"""What operators are called: as tables hold them, and as people read them."""

from __future__ import annotations

import json
from dataclasses import asdict

from spark3r.schedule import LayerRule, Operators


def operators_text(operators: Operators) -> str:
    """Return operators as tables hold them: JSON with sorted keys."""
    return json.dumps(asdict(operators), sort_keys=True)


def operators_name(operators: Operators) -> str:
    """Return what people call operators, such as ``token stride + anchor, β 1, linear``."""
    name = key_value_name(operators)
    return name + (", linear" if operators.unmerge == "linear" else "")


def query_name(operators: Operators) -> str:
    """Return what is done to queries: ``merged, linear unmerging``."""
    return "merged, " + ("linear unmerging" if operators.unmerge == "linear" else "copied back")


def key_value_name(operators: Operators) -> str:
    """Return what is done to keys and values, such as ``token stride + anchor, β 1``."""
    name = operators.key_value.replace("_", " ") + " + anchor" * operators.keep_anchor
    return name + (f", β {operators.mass_correction:g}" if operators.mass_correction else "")


def rule_name(rule: LayerRule) -> str:
    """Return what a resolved rule does to a layer, in words; a dash where it does nothing."""
    assert rule.operators is not None, "resolve the schedule first"
    queries = [f"queries {query_name(rule.operators)}"] if rule.query > 1 else []
    keys = [key_value_name(rule.operators)] if rule.key_value > 1 else []
    return "; ".join(keys + queries) or "–"
