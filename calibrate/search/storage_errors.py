"""Errors of a storage of trials. No message shows a password, in whatever form the URL holds it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote

import optuna

from spark3r.errors import Spark3rError, first_line, printable

Storage = str | Path | optuna.storages.BaseStorage | None
"""Path of a journal file, an Optuna URL (a string with ``://``), an open storage, or None."""

UNREADABLE = "(a URL that cannot be read)"

# The user and the password end at the first @, as SQLAlchemy reads them: a password may hold a /.
_URL = re.compile(
    r"(?P<driver>[\w+.-]+)://(?P<user>[^:/@]*(?::[^@]*)?@)?"
    r"(?P<host>\[[^\]/?@]*\]|[^:/?@]*)(?::\d*)?(?P<path>/[^?;#@=&\s]*)?(?P<rest>.*)",
    re.DOTALL,
)
_SQLITE_FILE = re.compile(r"(?P<shown>sqlite[\w+.-]*:///[^?;#]*)(?P<rest>.*)", re.DOTALL)


class StudyError(Spark3rError):
    """A study cannot be opened, continued or written."""


def is_journal(storage: Storage) -> bool:
    """Return whether a storage is the path of a journal file.

    A string such as ``postgresql:/host`` is a URL with a mistake, and no path.
    """
    if isinstance(storage, str):
        return "://" not in storage and not re.match(r"\s*[A-Za-z][\w+.-]+:", storage)
    return isinstance(storage, Path)


def shown(storage: Storage) -> str:
    """Return a storage's name for messages: a path, or driver, host and database of a URL.

    User, password, port and parameters are left out. Where it is not clear what belongs to a
    password, only the driver is shown.
    """
    if is_journal(storage):
        return str(storage)
    return _shown_and_hidden(_url(storage))[0]


def is_of_storage(error: BaseException) -> bool:
    """Return whether an error comes from a storage, rather than from what is stored there."""
    if isinstance(error, OSError | optuna.exceptions.StorageInternalError):
        return True
    return type(error).__module__.partition(".")[0] == "sqlalchemy"


def fail(storage: Storage, problem: str, error: BaseException) -> NoReturn:
    """Raise the error of a storage, with the driver's own message but without its passwords.

    Args:
        storage: The storage.
        problem: What is wrong, such as ``cannot be opened``.
        error: The error of the driver. It becomes the cause if the storage is a journal file;
            otherwise a traceback would show its message.

    Raises:
        StudyError: Always.
    """
    if isinstance(error, ImportError) and str(storage).startswith("postgres"):
        problem += "; pip install 'spark3r[distributed]' brings its driver"
    if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        reason = first_line(error.__cause__)  # the error itself only guesses
    else:
        reason = first_line(error)
    if is_journal(storage):
        raise StudyError(f"study storage {storage}: {problem} ({reason})") from error
    url = _url(storage)
    name, hidden = _shown_and_hidden(url)
    if url:
        reason = reason.replace(url, name)
    if not url.isprintable():  # escapes in the message would join the words to be hidden
        reason = f"{type(error).__name__}; its message is left out, because it may show a password"
    for word in hidden - _words(name):
        reason = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "***", reason)
    raise StudyError(f"study storage {name}: {problem} ({reason})") from None


def _url(storage: Storage) -> str:
    if isinstance(storage, str):
        return storage
    return str(getattr(storage, "url", ""))  # of an open database


def _shown_and_hidden(url: str) -> tuple[str, set[str]]:
    """Return what messages show of a URL, and the words that they must not hold."""
    if not url:
        return "(opened by the caller)", set()
    file = _SQLITE_FILE.fullmatch(url)
    if file is not None:
        return printable(file["shown"]), _values(file["rest"])
    parts = _URL.fullmatch(url)
    if parts is None:
        return UNREADABLE, _words(url)
    user, path, rest = parts["user"] or "", parts["path"] or "", parts["rest"]
    if "@" in rest or rest[:1] not in ("", "?", ";", "#"):
        return f"{parts['driver']}://...", _words(url.partition("://")[2])
    shown_url = printable(f"{parts['driver']}://{parts['host']}{path}")
    return shown_url, _words(user) | _values(rest)


def _values(parameters: str) -> set[str]:
    """Return the words of the values of parameters, and those of parameters without a value."""
    return {
        word
        for each in re.split(r"[?&;#]", parameters)
        for word in _words(each.partition("=")[2] or each)
    }


def _words(text: str) -> set[str]:
    """Return the words of a text, as they are and percent-decoded."""
    return set(re.findall(r"\w+", f"{text} {unquote(text)}"))
