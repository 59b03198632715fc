"""A model described in a TOML file, for commands: the arguments of `generic` that are plain values.

``like`` names a family whose model the described one resembles outside of attention: its images are
prepared, it is called, and its outputs are read as that family does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import FamilyError, first_line
from .base import Family
from .generic import generic
from .registry import FAMILIES, named_family

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_BYTES = 100_000
"""Largest description that is read."""


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_patterns(value: object) -> bool:
    several = value if isinstance(value, list) else [value]
    return bool(several) and all(isinstance(each, str) and each for each in several)


_PATTERNS = "a pattern of module names, or a list of them"
_COUNT = "an integer of at least 0"
_SWITCH = "true or false"
_EXPECTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "attention": (_is_patterns, _PATTERNS),
    "patch_size": (lambda value: _is_count(value) and value != 0, "pixels, at least 1"),
    "entry": (lambda value: isinstance(value, str), "the name of a module"),
    "special": (_is_count, _COUNT),
    "special_last": (lambda value: isinstance(value, bool), _SWITCH),
    "tail": (_is_count, _COUNT),
    "anchor_frame": (_is_count, _COUNT),
    "patches_overlap": (lambda value: isinstance(value, bool), _SWITCH),
    "like": (lambda value: isinstance(value, str) and value in FAMILIES, "a family"),
}
_NEEDED = ("attention", "patch_size")


def family_of(text: str) -> Family:
    """Return the family that ``--family`` names.

    Args:
        text: Name of a family, or the path of a description that ends in ``.toml``.

    Raises:
        FamilyError: If there is no such family, or the file is no description.
    """
    return read_family(Path(text)) if text.endswith(".toml") else named_family(text)


def read_family(path: Path) -> Family:
    """Return the family that a TOML file describes.

    Raises:
        FamilyError: If the file cannot be read, or does not describe a model.
    """
    values = _read(path)
    for name, value in values.items():
        if name not in _EXPECTED:
            raise FamilyError(
                f"{path}: there is no '{name}', expected only: {', '.join(_EXPECTED)}"
            )
        holds, expected = _EXPECTED[name]
        if not holds(value):
            known = f" ({', '.join(FAMILIES)})" if name == "like" else ""
            raise FamilyError(f"{path}: {name} is {value!r}, expected {expected}{known}")
    for name in _NEEDED:
        if name not in values:
            raise FamilyError(f"{path}: {name} is missing, expected {_EXPECTED[name][1]}")
    like = values.pop("like", None)
    family = generic(values.pop("attention"), **values)
    if like is None:
        return family
    known_family = FAMILIES[like]
    return replace(
        family,
        call=known_family.call,
        predict=known_family.predict,
        preprocess=known_family.preprocess,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            found = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise FamilyError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(found) > MOST_BYTES:
        raise FamilyError(f"{path} has more than {MOST_BYTES} bytes, expected a few lines of TOML")
    try:
        return tomllib.loads(found.decode())
    except UnicodeDecodeError as error:
        raise FamilyError(f"{path} is not a text in UTF-8, expected TOML") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FamilyError(f"{path} is not TOML: {first_line(error)}") from error
