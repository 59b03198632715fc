"""All errors and warnings of spark3r.

    Spark3rError
     ├── LayoutError      the tokens of a pass cannot be assigned to a layout
     ├── ScheduleError    factors, operators or a length rule out of range
     ├── ProfileError     a profile that is malformed or does not exist
     │    └── ProfileExistsError  a file that would be overwritten
     ├── FamilyError      a model whose architecture is unknown or unsupported
     ├── PatchError       a profile or schedule that cannot be applied to this model
     ├── ClipError        footage that cannot be read or used
     └── WeightsError     weights that are missing or do not fit

Each message says what was given, what was expected and what to do next.
"""

from __future__ import annotations


class Spark3rError(Exception):
    """Base of all errors that a user can cause; commands print them without a traceback."""


class LayoutError(Spark3rError):
    """The token layout of a pass is missing, ambiguous or does not fit the tokens."""


class ScheduleError(Spark3rError):
    """A factor, operator or length rule is out of range."""


class ProfileError(Spark3rError):
    """A profile is malformed, does not exist, or is of another kind than asked for."""


class ProfileExistsError(ProfileError):
    """A profile is not written, because a file of that name exists."""


class FamilyError(Spark3rError):
    """A model's architecture is unknown, ambiguous or not supported."""


class PatchError(Spark3rError):
    """A schedule cannot be applied to a model; the model is left as it was."""


class ClipError(Spark3rError):
    """A clip cannot be read, or the model cannot take it."""


class WeightsError(Spark3rError):
    """Model weights are missing or belong to another architecture."""


class Spark3rWarning(UserWarning):
    """Something works, but not quite as the user may expect."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """Return a text that cannot steer a terminal: it has escapes for control characters.

    Names of files, and in profiles and checkpoints, may hold any character. Line breaks stay.
    """
    return "".join(
        character
        if character.isprintable() or character in "\n\u00a0"
        else character.encode("unicode_escape").decode()
        for character in text
    )


for _public in (
    Spark3rError,
    LayoutError,
    ScheduleError,
    ProfileError,
    ProfileExistsError,
    FamilyError,
    PatchError,
    ClipError,
    WeightsError,
    Spark3rWarning,
):
    _public.__module__ = "spark3r"  # tracebacks show the public name
