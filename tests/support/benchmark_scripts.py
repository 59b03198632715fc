"""The modules of ``benchmarks/``, which are scripts and no package."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

import spark3r

FOLDER = Path(spark3r.__file__).parents[1] / "benchmarks"


def script(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """Return a script's module, to be imported for one test."""
    if not (FOLDER / f"{name}.py").exists():
        pytest.skip("benchmarks are not installed with the package")
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)
