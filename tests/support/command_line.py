"""Running the ``spark3r`` command in the process of a test."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from profile_documents import Document

from spark3r import cli


class Answer:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def object(self) -> Any:
        return json.loads(self.out)


def run(*arguments: str) -> Answer:
    """Run the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(arguments)
        except SystemExit as left:
            status = int(left.code or 0)
    return Answer(status, out.getvalue(), err.getvalue())


def store(document: Document, name: str = "mine.json") -> str:
    """Write a profile into the working folder and return its name."""
    Path(name).write_text(json.dumps(document))
    return name
