"""Tables of sensitivities on disk, so that another budget does not measure them again.

A table is stored under a hash of everything that it depends on, together with that key. If a file
cannot be read, or holds another key, the table is measured again. If the folder cannot be written,
a message says so, and the calibration continues.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import spark3r
from spark3r.clips import Clip
from spark3r.files import write_file
from spark3r.reduction.operators import OPERATORS_REVISION, Operators
from spark3r.runner import dtype_name

from ..settings import Job
from .probe import COLUMNS

REVISION = 1
"""Raised whenever a profiler's numbers change their meaning."""


def table_key(
    job: Job, clips: Sequence[Clip], operators: Sequence[Operators], **settings: object
) -> dict[str, Any]:
    """Return everything that a table of sensitivities depends on, as plain JSON values.

    Args:
        job: The job. All parameters of its model count, because metrics see the heads as well.
        clips: The clips, in order.
        operators: The probed operators.
        **settings: Other arguments of the profiler: factors, operating point.
    """
    runner = job.runner
    parameter = next(iter(runner.root.parameters()), None)
    key = {
        "revision": REVISION,
        "operators_revision": OPERATORS_REVISION,
        "spark3r": spark3r.__version__,
        "torch": torch.__version__,
        "family": runner.family.name,
        "model": job.fingerprint,
        "parameters": None if parameter is None else dtype_name(parameter.dtype),
        "autocast": dtype_name(runner.dtype or torch.float32),
        "device": None if parameter is None else parameter.device.type,
        "clips": [[clip.name, clip.digest(), clip.has_ground_truth] for clip in clips],
        "operators": [each.to_dict() for each in operators],
        "settings": {"objective": job.settings.objective, **settings},
    }
    plain: dict[str, Any] = json.loads(json.dumps(key, sort_keys=True))
    return plain


def cached_table(
    job: Job, key: Mapping[str, Any], measure: Callable[[], pd.DataFrame]
) -> pd.DataFrame:
    """Return the table that is stored under a key from `table_key`, or measure and store it.

    Without `Settings.cache` nothing is stored. The folder is created if it is missing.
    """
    if job.settings.cache is None:
        return measure()
    text = json.dumps(key, sort_keys=True)
    path = job.settings.cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    stored = _read(path, key)
    if stored is not None:
        return stored
    table = measure()
    try:
        _write(path, key, table)
    except OSError as error:
        job.reporter.say(
            f"the sensitivities could not be stored ({error}): another run measures them again"
        )
    return table


def _read(path: Path, key: Mapping[str, Any]) -> pd.DataFrame | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] != key:
            return None
        return pd.DataFrame(stored["rows"], columns=list(COLUMNS))
    except (OSError, ValueError, KeyError, TypeError):  # missing, not JSON, or something else
        return None


def _write(path: Path, key: Mapping[str, Any], table: pd.DataFrame) -> None:
    rows = table[list(COLUMNS)].to_numpy().tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps({"key": key, "rows": rows}))
