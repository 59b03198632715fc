"""Lines that say what is wrong with a profile: field, found and expected."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError

from ..errors import ProfileError

MAX_LINES = 20
MAX_ENTRIES = 1000
MAX_VALUE = 60

_Node = dict[str, Any]


def profile_error(source: str, problems: Sequence[str]) -> ProfileError:
    """Return the one error that reports every problem of a profile.

    Args:
        source: The file, or what else the profile came from.
        problems: One line each.
    """
    if len(problems) == 1:
        return ProfileError(f"{source}: {problems[0]}")
    shown = [f"  {line}" for line in problems[:MAX_LINES]]
    if len(problems) > MAX_LINES:
        shown.append(f"  and {len(problems) - MAX_LINES} more")
    return ProfileError("\n".join([f"{source}: {len(problems)} problems", *shown]))


def field_path(location: Iterable[str | int]) -> str:
    """Return a location as users write it, such as ``schedules[0].layers[7].key_value``."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return path or "the document"


def shown(value: object) -> str:
    """Return a found value as JSON, or in words when it is long."""
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # not JSON (built from Python), or more digits than printable
        text = type(value).__name__
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."


def problem_lines(error: ValidationError, schema: _Node) -> list[str]:
    """Return one line per validation error, with the expectation taken from the JSON Schema.

    A file that is wrong throughout gets lines for its first thousand errors.
    """
    lines: dict[str, None] = {}  # ordered, and free of repetitions
    entries = error.errors(include_url=False)
    inner = {entry["loc"][:depth] for entry in entries for depth in range(len(entry["loc"]))}
    for entry in entries[:MAX_ENTRIES]:
        if entry["type"] == "json_invalid":  # stricter than Python's parser
            return [f"not JSON that can be read: {entry['ctx']['error']}"]
        if entry["type"] == "too_short" and entry["loc"] in inner:
            continue  # pydantic counts the valid entries only, and the others are reported
        parents, location = _follow(schema, entry["loc"])
        node = parents[-1]
        path = field_path(location)
        if entry["type"] == "extra_forbidden":
            line = f"{path} is unknown, {_known_keys(schema, node, str(entry['loc'][-1]))}"
        elif entry["type"] == "missing":
            line = f"{path} is missing, expected {_expected(schema, node)}"
        else:
            line = f"{path} is {shown(entry['input'])}, expected {_expected(schema, node)}"
        lines[line] = None
    return list(lines)


def _follow(schema: _Node, location: Sequence[str | int]) -> tuple[list[_Node], list[str | int]]:
    """Walk the schema along a location, as far as it leads.

    Steps that the schema does not have (an unknown key, pydantic's names of union members) end
    the walk; an unknown key still belongs to the path.
    """
    nodes = [schema]
    for position, step in enumerate(location):
        branches = _branches(schema, nodes[-1])
        children = [child for node in branches if (child := _child(node, step)) is not None]
        if not children:
            unknown_key = any(
                node.get("additionalProperties") is False and isinstance(step, str)
                for node in branches
            )
            return nodes, list(location[: position + unknown_key])
        nodes.append(children[0])
    return nodes, list(location)


def _resolve(schema: _Node, node: _Node) -> _Node:
    reference = node.get("$ref")
    return node if reference is None else schema["$defs"][reference.rpartition("/")[2]]


def _branches(schema: _Node, node: _Node) -> list[_Node]:
    node = _resolve(schema, node)
    return [_resolve(schema, branch) for branch in node.get("anyOf", [node])]


def _child(node: _Node, step: str | int) -> _Node | None:
    if isinstance(step, str):
        child = node.get("properties", {}).get(step, node.get("additionalProperties"))
    elif step < len(node.get("prefixItems", ())):
        child = node["prefixItems"][step]
    else:
        child = node.get("items")
    return child if isinstance(child, dict) else None


def _known_keys(schema: _Node, node: _Node, key: str) -> str:
    known = [name for branch in _branches(schema, node) for name in branch.get("properties", {})]
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"expected only: {', '.join(known)}"


def _expected(schema: _Node, node: _Node) -> str:
    return " or ".join(_words(branch) for branch in _branches(schema, node))


def _words(node: _Node) -> str:
    if "const" in node:
        return json.dumps(node["const"])
    if "enum" in node:
        return f"one of: {', '.join(node['enum'])}"
    kind = node["type"]
    if kind == "string":
        empty_allowed = "minLength" not in node
        return node.get("description", "a string" if empty_allowed else "a string, not empty")
    if kind in ("integer", "number"):
        words = "an integer" if kind == "integer" else "a finite number"
        if "maximum" in node:
            return f"{words} from {node['minimum']:g} to {node['maximum']:g}"
        if "exclusiveMinimum" in node:
            return f"{words} above {node['exclusiveMinimum']:g}"
        return f"{words} of at least {node['minimum']:g}" if "minimum" in node else words
    if kind == "array":
        least = node.get("minItems")
        if least is None:
            return "a list"
        return (
            f"a list of {least}" if least == node.get("maxItems") else f"a list of at least {least}"
        )
    if kind == "object":
        return "an object" if "minProperties" not in node else "an object that is not empty"
    return {"boolean": "true or false", "null": "null"}[kind]
