"""Lines that say what is wrong with a profile: field, found and expected."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import get_args

from pydantic import BaseModel, ValidationError

from ..errors import ProfileError

MAX_LINES = 20
MAX_ENTRIES = 1000
MAX_VALUE = 60

_EXPECTED: Mapping[str, str] = MappingProxyType(
    {
        "bool_type": "true or false",
        "dict_type": "an object",
        "finite_number": "a finite number",
        "float_type": "a number",
        "greater_than": "more than {gt:g}",
        "greater_than_equal": "{ge:g} or more",
        "int_from_float": "an integer",
        "int_type": "an integer",
        "less_than_equal": "{le:g} or less",
        "literal_error": "{expected}",
        "model_type": "an object",
        "string_pattern_mismatch": "a string that matches {pattern}",
        "string_too_short": "a string that is not empty",
        "string_type": "a string",
        "too_long": "{max_length} or fewer entries",
        "too_short": "{min_length} or more entries",
        "tuple_type": "a list",
        "value_error": "{error}",
    }
)
"""What a field should have held, by pydantic's type of error."""


def profile_error(source: str, problems: Sequence[str]) -> ProfileError:
    """Return the one error that reports every problem of a profile.

    Args:
        source: Name of the file, or of another origin of the profile.
        problems: One line per problem.
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
    except (TypeError, ValueError):  # a value from Python, or an integer of thousands of digits
        text = type(value).__name__
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."


def problem_lines(error: ValidationError, document: type[BaseModel]) -> list[str]:
    """Return one line per validation error: where it is, what was found, what was expected.

    A file that is wrong throughout gets lines for its first thousand errors.

    Args:
        error: Errors of a document.
        document: Class that validated the document; it knows the names of all fields.
    """
    entries = error.errors(include_url=False)
    inner = {entry["loc"][:depth] for entry in entries for depth in range(len(entry["loc"]))}
    lines = []
    for entry in entries[:MAX_ENTRIES]:
        kind, location = entry["type"], entry["loc"]
        path = field_path(location)
        if kind == "json_invalid":  # pydantic's parser is stricter than Python's
            return [f"not JSON that can be read: {entry['ctx']['error']}"]
        if kind == "too_short" and location in inner:
            continue  # pydantic counts only valid entries, and the others have their own lines
        if kind == "extra_forbidden":
            lines.append(f"{path} is unknown, {_known_keys(document, location)}")
        elif kind == "missing":
            lines.append(f"{path} is missing")
        elif kind in _EXPECTED:
            expected = _EXPECTED[kind].format(**entry.get("ctx", {}))
            lines.append(f"{path} is {shown(entry['input'])}, expected {expected}")
        else:
            lines.append(f"{path} is {shown(entry['input'])}: {entry['msg']}")
    return lines


def _known_keys(document: type[BaseModel], location: Sequence[str | int]) -> str:
    """Return the hint for an unknown key: a known key of the same object that is spelt alike."""
    section = document
    for step in location[:-1]:
        if isinstance(step, str):
            section = _section_in(section.model_fields[step].annotation) or section
    known = [field.alias or name for name, field in section.model_fields.items()]
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"expected only: {', '.join(known)}"


def _section_in(annotation: object) -> type[BaseModel] | None:
    """Return the class of objects that a field holds, alone, as an option or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_section_in(part) for part in get_args(annotation))
    return next((section for section in inner if section is not None), None)
