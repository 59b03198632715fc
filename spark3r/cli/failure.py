"""What a command says when it fails, in one line."""

from __future__ import annotations

from ..errors import Spark3rError, first_line, printable
from ..memory import is_out_of_memory


def failure_text(error: BaseException, less: str = "give fewer --frames") -> str:
    """Return the message of an error that ended a command.

    Args:
        error: The error.
        less: What to ask for so that less memory is needed.
    """
    if isinstance(error, Spark3rError):
        return printable(str(error))
    if is_out_of_memory(error):
        reason = printable(first_line(error))
        return f"out of memory: {less}, or make more memory free ({reason})"
    if isinstance(error, OSError):
        return printable(f"{error.filename or 'a file'}: {error.strerror or error}")
    return (
        f"internal error, {type(error).__name__}: {printable(str(error))} "
        "(--debug shows where; please report it with `python -m spark3r.env`)"
    )
