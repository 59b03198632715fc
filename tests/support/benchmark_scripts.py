"""The modules of ``benchmarks/``, which are scripts and not a package."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest

import spark3r

FOLDER = Path(spark3r.__file__).parents[1] / "benchmarks"


def script(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """Return a script's module, importable for one test. A name in a folder has a dot."""
    if not (FOLDER / f"{name.replace('.', '/')}.py").exists():
        pytest.skip("benchmarks are not installed with the package")
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


def environment() -> dict[str, str]:
    """Return the environment of a process that imports both the scripts and the packages."""
    paths = [str(FOLDER), str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
