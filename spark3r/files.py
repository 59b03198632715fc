"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path


def write_file(path: Path, content: str | bytes, *, overwrite: bool = True) -> None:
    """Write a file. If writing fails, or the process ends, the file stays as it was.

    The content goes to a temporary file in the same folder, which then replaces the file. If the
    path is a symbolic link, the file that it leads to is replaced. A device or a pipe, such as
    ``/dev/null``, is written to.

    Args:
        path: The file.
        content: Its content; text becomes UTF-8 with line ends as they are.
        overwrite: Whether the file may exist already, default True.

    Raises:
        FileExistsError: If the file exists and ``overwrite`` is not set, even if another process
            wrote it in the meantime.
        OSError: If the file cannot be written. Its ``filename`` is the path.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        if overwrite and target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, target)
        else:
            _link(temporary, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _link(temporary: Path, target: Path) -> None:
    """Give a file another name, unless it is taken. It is safe among several processes.

    Raises:
        FileExistsError: If the name is taken.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # the file system has no links
        if target.exists():
            raise FileExistsError(errno.EEXIST, "exists already") from None
        os.replace(temporary, target)
