"""The subcommands of ``spark3r``: one file each.

A subcommand is one function that takes the subparsers, declares its arguments and names what runs
it (``run=``). It imports what it runs only then, so that help stays instant.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from .bench import add_bench
from .check import add_check
from .listing import add_list
from .run import add_run
from .show import add_show

COMMANDS: tuple[Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None], ...] = (
    add_list,
    add_show,
    add_check,
    add_run,
    add_bench,
)

__all__ = ["COMMANDS"]
