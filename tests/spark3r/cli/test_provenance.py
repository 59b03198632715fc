"""What is said of a model's own code that is of another version than was checked."""

from __future__ import annotations

import pytest

from spark3r.cli.provenance import other_code


@pytest.mark.parametrize(
    ("version", "commit", "checked", "told"),
    [
        ("0.0.1", "aaaa", "aaaa", ""),
        ("0.0.1", "bbbb", "aaaa", "vggt is installed at bbbb; spark3r was checked against aaaa"),
        ("0.0.1", None, "aaaa", ""),  # installed from a folder: the commit is not known
        (None, None, "aaaa", ""),  # on the Python path
        ("0.1.1", None, "0.1.1", ""),
        ("0.2.0", None, "0.1.1", "vggt is installed at 0.2.0; spark3r was checked against 0.1.1"),
    ],
)
def test_other_code(version: str | None, commit: str | None, checked: str, told: str) -> None:
    code = {"package": "vggt", "version": version, "commit": commit, "checked": checked}
    assert other_code({"code": code}) == told
    assert other_code({"code": None}) == ""
