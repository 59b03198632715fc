"""The ``spark3r`` command: its parser, exit status and error messages.

Heavy imports happen only after the arguments are parsed.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NoReturn

from .. import __version__
from ..errors import first_line
from ..ranks import of_environment
from .arguments import UsageError
from .bench import add_bench
from .check import add_check
from .export import add_export
from .failure import failure_text
from .listing import add_list
from .memory import add_memory
from .run import add_run
from .show import add_show
from .termination import Terminated, raise_on_sigterm, word_and_status
from .verify import add_verify

DONE, FAILED, WRONG_USAGE = 0, 1, 2

COMMANDS: tuple[Callable[[Any], None], ...] = (
    add_list,
    add_show,
    add_check,
    add_run,
    add_export,
    add_bench,
    add_verify,
    add_memory,
)
"""The subcommands. Each function declares the arguments of one and sets the function that runs it
(``run=``), which does its imports itself, so that ``--help`` is fast."""

GROUP = "spark3r.commands"
"""Group of the entry points by which installed packages add subcommands, by such functions."""

EXAMPLES = """examples:
  spark3r list
  spark3r show vggt-1b --frames 500
  spark3r run --clip rendered:7 --output out
  spark3r run --model vggt:facebook/VGGT-1B --clip tour.mp4 --frames 100 --output out
  spark3r check my_profile.json --model my_package.models:make_vggt
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    It is 0 if done, 1 if failed, 2 after wrong usage, 4 for a deviation above ``--fail-above``, 130
    after Ctrl-C and 143 after SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # some terminals lack letters that names have
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(words)
    options.command = ("spark3r", *words)
    sys.path.append(os.getcwd())  # for a model factory in the working folder, as with python -m
    try:
        with raise_on_sigterm():
            status: int = options.run(options)
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # the reader of our output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KeyboardInterrupt, Terminated) as stop:
        word, status = word_and_status(stop)
        if not _claims_failure(options):
            return status
        print(f"spark3r: {word}: {_what_is_kept(options)}", file=sys.stderr)
        return status
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        elif _claims_failure(options):
            print(f"spark3r: {failure_text(error)}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED


def _claims_failure(options: argparse.Namespace) -> bool:
    """Return True if this process tells of its failure: of several ranks, the first that fails."""
    claims: Callable[[], bool] | None = getattr(options, "claims_failure", None)
    return of_environment()[0] == 0 if claims is None else claims()


class _Parser(argparse.ArgumentParser):
    """A parser that tells of wrong usage in one line."""

    def error(self, message: str) -> NoReturn:
        if of_environment()[0] > 0:  # rank 0 says it
            self.exit(WRONG_USAGE)
        self.exit(WRONG_USAGE, f"{self.prog}: {message} (`{self.prog} --help` shows the options)\n")


def _what_is_kept(options: argparse.Namespace) -> str:
    output = getattr(options, "output", None)
    if output is not None and output.exists():  # outputs appear whole
        return f"{output} is there and whole"
    return "nothing was written, so the same command starts again"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    whole = _Parser(
        prog="spark3r",
        description="Token-reduction schedules for feed-forward 3D reconstruction transformers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="version", version=f"spark3r {__version__}")
    _add_debug(whole, False)
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (*COMMANDS, *commands_of_others()):
        add(commands)
    for command in commands.choices.values():
        _add_debug(command, argparse.SUPPRESS)  # keeps a --debug given before the command
    return whole


def commands_of_others() -> list[Callable[[Any], None]]:
    """Return the functions that declare subcommands of other installed packages."""
    found = []
    for each in metadata.entry_points(group=GROUP):
        try:
            found.append(each.load())
        except Exception as error:
            line = f"spark3r: the command '{each.name}' is missing: {first_line(error)}"
            print(line, file=sys.stderr)
    return found


def _add_debug(command: argparse.ArgumentParser, default: bool | str) -> None:
    command.add_argument(
        "--debug", action="store_true", default=default, help="show a traceback on failure"
    )
