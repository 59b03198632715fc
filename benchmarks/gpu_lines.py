"""Figures of a GPU run: one JSON line each, on the disk before the next one is measured."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Lines:
    """The file to which a stage writes its figures.

    Attributes:
        path: The file.
        stage: Name of the stage, written into every line.
        began: Time at which the stage began.
    """

    path: Path
    stage: str
    began: float = field(default_factory=time.monotonic)

    def put(self, figure: str, **values: Any) -> None:
        """Append a line, and return when it is on the disk."""
        at_s = round(time.monotonic() - self.began, 1)
        row = {"stage": self.stage, "figure": figure, "at_s": at_s, **values}
        text = json.dumps(row, default=str)
        print(text, flush=True)
        with self.path.open("ab+") as file:
            # A process that was killed while it wrote may have left half a line.
            if file.tell() and not _ends_in_newline(file):
                text = "\n" + text
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def failed(self, figure: str, error: Exception, **values: Any) -> None:
        """Append a line in the place of a figure that an error prevented."""
        message = str(error).strip().splitlines()
        text = f"{type(error).__name__}: {message[0][:300] if message else ''}"
        self.put(figure, **values, error=text)

    @contextmanager
    def guarded(self, figure: str, **values: Any) -> Iterator[None]:
        """Run the block; if it raises an error, write a line that says so, and go on."""
        try:
            yield
        except Exception as error:  # whatever a kernel, a driver or an allocator raises
            self.failed(figure, error, **values)
            traceback.print_exc()
        finally:
            _free()


def read_lines(path: Path) -> tuple[list[Row], int]:
    """Return the figures of a file in their order, and how many of its lines are damaged."""
    rows: list[Row] = []
    damaged = 0
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # half a line, or half a character
            damaged += 1
            continue
        if isinstance(row, dict) and isinstance(row.get("stage"), str) and "figure" in row:
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def _ends_in_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def _free() -> None:
    """Return the device's cached memory, which the next figure may need in other pieces."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # after an illegal access the device answers nothing any more
            traceback.print_exc()
