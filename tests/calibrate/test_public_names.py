from __future__ import annotations

import ast
from pathlib import Path

import pytest

import calibrate


@pytest.mark.parametrize("name", calibrate.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(calibrate, name) is not None


def test_public_names_are_declared_for_type_checkers_too() -> None:
    tree = ast.parse(Path(calibrate.__file__).read_text(encoding="utf-8"))
    declared = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert declared == set(calibrate.__all__) <= set(dir(calibrate))


def test_submodules_resolve_and_unknown_names_are_attribute_errors() -> None:
    assert calibrate.budget.parse_budget("2x").value == 2
    with pytest.raises(AttributeError, match="module 'calibrate' has no attribute 'calibrat'"):
        calibrate.calibrat  # noqa: B018
