"""Tests that need the models' own code."""

from __future__ import annotations

import os

import pytest
from family_cases import ALL_CASES, missing


def need_upstream(family: str) -> None:
    """Skip a test if a family's upstream code is missing; fail it if SPARK3R_REQUIRE asks for it.

    SPARK3R_REQUIRE names families, such as ``da3`` or ``da3,vggt``.
    """
    absent = {name for case in ALL_CASES if case.family == family for name in missing(case)}
    if not absent:
        return
    what = f"NOT VERIFIED: family {family} on upstream code ({', '.join(sorted(absent))} missing)"
    if family in os.environ.get("SPARK3R_REQUIRE", "").split(","):
        pytest.fail(f"{what}, but SPARK3R_REQUIRE asks for it")
    pytest.skip(what)
