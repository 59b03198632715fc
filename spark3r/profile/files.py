"""Profile files: strict reading and atomic writing."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ProfileError, ProfileExistsError
from ..files import write_file
from .messages import field_path

MAX_BYTES = 4 * 2**20
"""Largest profile file. The figures of 200 held-out clips under seven schedules fit twice."""

MAX_VALUES = 100_000
"""Most values in a profile, objects and lists included. It bounds the time that a check takes, as
the next two do."""

MAX_LENGTH = 10_000
"""Most entries of a list."""

MAX_DEPTH = 20
"""Most objects and lists inside one another. A profile has 8."""

TOO_DEEP = f"the document is nested more than {MAX_DEPTH} levels deep, expected a profile"


def read_text(path: Path) -> str:
    """Return the text of a profile file.

    Raises:
        ProfileError: If it cannot be read, is no regular file, is empty, too large, or not UTF-8.
    """
    if os.path.isdir(path):
        raise ProfileError(f"{path}: is a folder, expected a profile file (.json)")
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ProfileError(f"{path}: is no regular file, expected a profile file (.json)")
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ProfileError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: the path has a NUL character
        raise ProfileError(f"{path}: cannot be read ({_reason(error)})") from error
    if len(raw) > MAX_BYTES:
        raise ProfileError(f"{path}: larger than {MAX_BYTES // 2**20} MiB, expected a profile")
    if not raw.strip():
        raise ProfileError(f"{path}: is empty, expected a profile (JSON)")
    try:
        return raw.decode("utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: not UTF-8 (byte {error.start})") from error


def _without_waiting(path: str, flags: int) -> int:
    """Open a file. A pipe that nobody writes to opens at once too, and is then refused."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


class _Pairs(dict[str, Any]):
    """A JSON object that remembers keys given twice; JSON parsers keep only the last value."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs) if len(self) < len(pairs) else {}
        self.repeated = sorted(key for key, count in counts.items() if count > 1)


def parse(text: str, source: str) -> Any:
    """Return parsed JSON.

    Raises:
        ProfileError: If the text is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_Pairs)
    except RecursionError:
        raise ProfileError(f"{source}: {TOO_DEEP}") from None
    except ValueError as error:
        raise ProfileError(f"{source}: not JSON: {error}") from error


def structure_problems(document: Any) -> list[str]:
    """Return what is wrong with the structure of a parsed document, whatever its fields mean.

    That is one line per key that an object holds twice; or one line alone, if the document has more
    values, entries or levels than any profile.
    """
    lines: list[str] = []
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), document)]
    values = 1
    while pending:
        location, value = pending.pop()
        children: Iterable[tuple[str | int, Any]]
        if isinstance(value, _Pairs):
            lines += [f"{field_path((*location, key))} is given twice" for key in value.repeated]
            children = value.items()
        elif isinstance(value, list):
            children = enumerate(value)
        else:
            continue
        values += len(value)
        if values > MAX_VALUES:
            return [f"the document has more than {MAX_VALUES} values, expected a profile"]
        if isinstance(value, list) and len(value) > MAX_LENGTH:
            return [f"{field_path(location)} is a list of {len(value)}, expected a profile"]
        if len(location) == MAX_DEPTH:
            return [TOO_DEEP]
        pending += [((*location, step), child) for step, child in reversed(list(children))]
    return lines


def render(document: dict[str, Any]) -> str:
    """Return a document as JSON text. Keys keep their order, so that profiles compare by line."""
    return json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def write_text(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a profile's text whole or not at all; see `spark3r.files.write_file`.

    Raises:
        ProfileExistsError: If the file exists and ``overwrite`` is not set.
        ProfileError: If the file cannot be written, or could not be read again.
    """
    too_large = len(text.encode()) > MAX_BYTES
    if too_large or structure_problems(parse(text, str(path))):
        raise ProfileError(
            f"{path}: the profile is too large to be read again (at most {MAX_BYTES // 2**20} MiB, "
            f"{MAX_VALUES} values and {MAX_LENGTH} entries in a list): keep fewer clips"
        )
    try:
        target = Path(os.path.realpath(path))  # a symbolic link stays one
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be written ({_reason(error)})") from error
    if os.path.isdir(target):
        raise ProfileError(f"{path}: is a folder, expected a file name")
    taken = f"{path}: exists already; pass overwrite=True or choose another name"
    if os.path.exists(target) and not overwrite:
        raise ProfileExistsError(taken)
    try:
        write_file(target, text, overwrite=overwrite)
    except FileExistsError:  # another process was faster
        raise ProfileExistsError(taken) from None
    except OSError as error:
        raise ProfileError(f"{path}: cannot be written ({_reason(error)})") from error
