"""Messages about a malformed profile: which field, what was found, what was expected."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from pydantic import ValidationError

from ..errors import ProfileError
from .model import Section, section_in

MAX_LINES = 20
MAX_ENTRIES = 1000
MAX_ERRORS = 10_000  # more take pydantic longer to list than anyone reads
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
"""The text after "expected", by pydantic's type of error."""


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
    """Return a location in the notation of Python, such as ``schedules[0].layers[7].key_value``."""
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


def problem_lines(error: ValidationError, document: type[Section]) -> list[str]:
    """Return one line per validation error: where it is, what was found, what was expected.

    A file that is wrong throughout gets lines for its first thousand errors, or one line with their
    number.

    Args:
        error: Errors of a document.
        document: Class that validated the document.
    """
    if error.error_count() > MAX_ERRORS:
        return [f"the document has {error.error_count()} problems, expected a profile"]
    entries = error.errors(include_url=False)[:MAX_ENTRIES]
    inner = {entry["loc"][:depth] for entry in entries for depth in range(len(entry["loc"]))}
    lines = []
    for entry in entries:
        kind, location = entry["type"], entry["loc"]
        path = field_path(location)
        if kind == "json_invalid":  # pydantic's parser is stricter than Python's
            return [f"not JSON that can be read: {entry['ctx']['error']}"]
        if kind == "too_short" and location in inner:
            continue  # pydantic counts only valid entries, and the others have their own lines
        if kind == "extra_forbidden":
            lines.append(f"{path} is unknown, {_known_keys(document, location)}")
        elif kind == "missing":
            lines.append(f"{path} is missing, expected: {_meaning(document, location)}")
        elif kind in _EXPECTED:
            expected = _EXPECTED[kind].format(**entry.get("ctx", {}))
            lines.append(f"{path} is {shown(entry['input'])}, expected {expected}")
        else:
            lines.append(f"{path} is {shown(entry['input'])}: {entry['msg']}")
    return lines


def _known_keys(document: type[Section], location: Sequence[str | int]) -> str:
    """Return the hint for an unknown key: a known key that is spelt alike, or all of them."""
    section, key = _field_at(document, location)
    known = [field.alias or name for name, field in section.model_fields.items()]
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"expected only: {', '.join(known)}"


def _meaning(document: type[Section], location: Sequence[str | int]) -> str:
    """Return the first sentence of the description of the field at a location."""
    section, key = _field_at(document, location)
    description = section.model_fields[key].description or ""
    return " ".join(description.split()).partition(". ")[0].removesuffix(".")


def _field_at(document: type[Section], location: Sequence[str | int]) -> tuple[type[Section], str]:
    """Return the last key of a location, and the class of the object that it belongs to."""
    *parents, key = (step for step in location if isinstance(step, str))
    section = document
    for name in parents:
        section = section_in(section.model_fields[name].annotation) or section
    return section, key
