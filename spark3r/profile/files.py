"""Profile files: strict reading and atomic writing."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import ProfileError, ProfileExistsError
from ..files import write_file
from .messages import field_path

MAX_BYTES = 16 * 2**20


def read_text(path: Path) -> str:
    """Return the text of a profile file.

    Raises:
        ProfileError: If it cannot be read, is empty, too large, or not UTF-8.
    """
    if path.is_dir():
        raise ProfileError(f"{path}: is a folder, expected a profile file (.json)")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ProfileError(f"{path}: no such file") from None
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(raw) > MAX_BYTES:
        raise ProfileError(f"{path}: larger than {MAX_BYTES // 2**20} MiB, expected a profile")
    if not raw.strip():
        raise ProfileError(f"{path}: is empty, expected a profile (JSON)")
    try:
        return raw.decode("utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise ProfileError(f"{path}: not UTF-8 (byte {error.start})") from error


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
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{source}: not JSON: {error}") from error


def repeated_keys(document: Any) -> list[str]:
    """Return one line per key that an object of a parsed document holds twice."""
    lines: list[str] = []
    pending: list[tuple[tuple[str | int, ...], Any]] = [((), document)]
    while pending:  # a file may be nested too deeply for recursion
        location, value = pending.pop()
        children: list[tuple[str | int, Any]] = []
        if isinstance(value, _Pairs):
            lines += [f"{field_path((*location, key))} is given twice" for key in value.repeated]
            children = list(value.items())
        elif isinstance(value, list):
            children = list(enumerate(value))
        pending += [((*location, step), child) for step, child in reversed(children)]
    return lines


def render(document: dict[str, Any]) -> str:
    """Return a document as JSON text. Keys keep their order, so that profiles compare by line."""
    return json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def write_text(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a text file whole or not at all; see `spark3r.files.write_file`.

    Raises:
        ProfileExistsError: If the file exists and ``overwrite`` is not set.
        ProfileError: If the file cannot be written.
    """
    target = Path(os.path.realpath(path))  # a symbolic link stays one
    if target.is_dir():
        raise ProfileError(f"{path}: is a folder, expected a file name")
    taken = f"{path}: exists already; pass overwrite=True or choose another name"
    if target.exists() and not overwrite:
        raise ProfileExistsError(taken)
    try:
        write_file(target, text, overwrite=overwrite)
    except FileExistsError:  # another process was faster
        raise ProfileExistsError(taken) from None
    except OSError as error:
        raise ProfileError(f"{path}: cannot be written ({error.strerror or error})") from error
