"""Checks of the values that users build schedules from."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import Any

from .errors import ScheduleError


def integer(value: Any, name: str, minimum: int = 1) -> int:
    """Return ``value`` as an int. NumPy's integers are accepted, booleans and 4.0 are not.

    Raises:
        ScheduleError: If it is no integer, or less than ``minimum``.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < minimum:
        raise ScheduleError(f"{name} is {value!r}, expected an integer of at least {minimum}")
    return index(value)


def require_choice(value: object, name: str, choices: Iterable[str]) -> None:
    """Raise `ScheduleError` unless ``value`` is one of ``choices``."""
    if value not in tuple(choices):
        raise ScheduleError(f"{name} is {value!r}, expected one of: {', '.join(choices)}")


def require_boolean(value: object, name: str) -> None:
    """Raise `ScheduleError` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ScheduleError(f"{name} is {value!r}, expected true or false")


def require_fraction(value: object, name: str) -> None:
    """Raise `ScheduleError` unless ``value`` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ScheduleError(f"{name} is {value!r}, expected a number from 0 to 1")
