"""What a reconstruction was made from: the command, the weights, the code and the profile."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..identity import origin_of
from ..loading.load import about
from ..loading.upstream import UPSTREAMS
from ..profile import profile_path
from ..runner import Runner

_PIECE = 2**20  # bytes read at once


def provenance(
    command: Sequence[str], runner: Runner, model: str, profile: str | None, schedule: str
) -> dict[str, Any]:
    """Return the record of a run's origins, as ``run.json`` and every other file hold it.

    Args:
        command: Words of the command.
        runner: The model.
        model: Its name, as ``--model`` takes it.
        profile: Name or path of the profile, None if the run is dense.
        schedule: Name of the schedule.
    """
    known, origin = about(model), origin_of(runner.root)
    file = None if origin is None else origin.file
    return {
        "spark3r": __version__,
        "command": shlex.join(command),
        "model": model,
        "weights": {
            "name": known.weights,
            "file": None if file is None else file.name,
            "sha256": None if file is None else sha256(file),
            "revision": None if origin is None else origin.revision,
            "licence": known.licence or None,
            "attention": runner.record().fingerprint,
        },
        "code": _code(runner.family.name),
        "profile": None
        if profile is None
        else {"name": profile, "sha256": sha256(profile_path(profile)), "schedule": schedule},
    }


def _code(family: str) -> dict[str, Any] | None:
    """Return which code of a family's own is installed, and which spark3r was checked against."""
    upstream = UPSTREAMS.get(family)
    found = None if upstream is None else upstream.installed
    if upstream is None or found is None:
        return None
    return {
        "package": found.package,
        "version": found.version,
        "commit": found.commit,
        "checked": upstream.checked,
    }


def other_code(record: Mapping[str, Any]) -> str:
    """Return a line about code of another version than was checked, "" if there is none.

    Args:
        record: The record that `provenance` returned.
    """
    code = record["code"]
    if code is None:
        return ""
    installed = code["version" if "." in code["checked"] else "commit"]
    if installed in (None, code["checked"]):
        return ""
    return (
        f"{code['package']} is installed at {installed}; spark3r was checked against "
        f"{code['checked']}"
    )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()
