"""Messages that a terminal can show."""

from __future__ import annotations

import pytest

from spark3r.errors import printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("π³, 25 % – two\nlines", "π³, 25 % – two\nlines"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("\x9b31m\r\x7f\0", "\\x9b31m\\r\\x7f\\x00"),
        ("\u202etxt.exe\ud800", "\\u202etxt.exe\\ud800"),
    ],
)
def test_control_characters_are_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected
