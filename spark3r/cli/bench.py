"""``spark3r bench``: measure a model's speed dense, at the wall and under schedules."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Spark3rError, Spark3rWarning
from ..files import write_file
from .arguments import (
    add_dtype,
    add_family,
    add_json,
    add_model,
    chosen_dtype,
    chosen_family,
    parse_count,
    parse_grid,
    parse_path,
    parse_text,
    usable_device,
)
from .tables import print_table

if TYPE_CHECKING:
    from ..benchmark.result import Benchmark

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

SCHEDULES = ("dense", "paper", "wall")
BACKENDS = ("auto", "fastest", "flash", "efficient", "cudnn", "math")


def add_bench(commands: Subparsers) -> None:
    """Declare ``spark3r bench``."""
    command = commands.add_parser(
        "bench",
        help="measure speed and memory side by side",
        description="Measure a model on random clips: dense, at the wall (global attention returns "
        "zeros), under schedules, and beside FastVGGT's merging. All treatments of a length are "
        "measured in turns, each with the family's memory saver.",
        allow_abbrev=False,
    )
    add_model(command, default="reference")
    add_family(command)
    command.add_argument(
        "--frames",
        type=_counts,
        default=(128,),
        metavar="N,N",
        help="lengths of the clips (default: 128)",
    )
    command.add_argument(
        "--schedules",
        type=_names,
        default=SCHEDULES,
        metavar="A,B",
        help="dense, wall, paper, fastvggt, uniform:QUERY:KEY_VALUE, "
        "token_stride:QUERY:KEY_VALUE, profiles "
        f"(default: {','.join(SCHEDULES)})",
    )
    command.add_argument(
        "--sensitive",
        type=_layers,
        metavar="I,I",
        help="sensitive layers of 'paper', counted from 0, where the paper does not name them",
    )
    command.add_argument(
        "--grid",
        type=parse_grid,
        metavar="HxW",
        help="rows and columns of patches per frame (default: 28x37; reference: 8x8)",
    )
    command.add_argument(
        "--device", type=parse_text, default="cpu", metavar="D", help="cpu, cuda, cuda:1 ..."
    )
    add_dtype(command)
    command.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="attention kernel; 'fastest' times them on a dense layer (default: torch chooses)",
    )
    command.add_argument(
        "--dense-up-to",
        type=parse_count,
        metavar="N",
        help="beyond this length, model dense from the two longest measured lengths, and mark it",
    )
    command.add_argument(
        "--once-from",
        type=parse_count,
        metavar="N",
        help="from this length on, run dense and fastvggt a single time",
    )
    command.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the time that the process computes, on a CPU that other processes keep busy",
    )
    command.add_argument(
        "--rounds",
        type=parse_count,
        default=5,
        metavar="N",
        help="samples of each treatment (default: 5)",
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the random images (default: 0)"
    )
    command.add_argument(
        "--output", type=parse_path, metavar="FILE", help="write the result as JSON"
    )
    command.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    add_json(command)
    command.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    if options.output is not None:
        refuse_output(options.output, options.overwrite)
    import torch

    from ..benchmark.api import bench
    from ..loading.load import about, load_model

    device = usable_device(options.device)
    if options.cpu_time and device != "cpu":
        raise Spark3rError(f"--cpu-time does not count the work of device '{device}': leave it out")
    family = chosen_family(options)
    known = about(options.model)
    if known.notice:
        print(f"spark3r: {known.notice}", file=sys.stderr, flush=True)
    model = load_model(options.model, device)
    dtype = chosen_dtype(options, device)
    with _notes_at_the_end():
        result = bench(
            model,
            options.frames,
            options.schedules,
            name=options.model,
            grid=options.grid,
            sensitive=options.sensitive,
            backend=options.backend,
            dtype=None if dtype == torch.float32 else dtype,
            dense_up_to=options.dense_up_to,
            once_from=options.once_from,
            cpu_time=options.cpu_time,
            rounds=options.rounds,
            seed=options.seed,
            family=family,
            progress=lambda message: print(message, file=sys.stderr, flush=True),
        )
    written = json.dumps(result.to_dict(), indent=2)
    if options.output is not None:
        write_output(options.output, written + "\n")
    if options.json:
        print(written)
    else:
        print_result(result)
    return 0


@contextmanager
def _notes_at_the_end() -> Iterator[None]:
    """Show each warning of spark3r once, as a note, when the block ends."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Spark3rWarning)
        try:
            yield
        finally:
            for message in dict.fromkeys(str(each.message) for each in caught):
                print(f"spark3r: note: {message}", file=sys.stderr, flush=True)


def print_result(result: Benchmark) -> None:
    """Print a benchmark's table, the time by part, and the growth exponents."""
    from ..benchmark.breakdown import PARTS
    from ..benchmark.result import COLUMNS, cells, part_cells

    rows, columns = result.grid
    print(
        f"{result.model}, {rows}x{columns} patches, {result.dtype} on {result.device}, "
        f"attention kernel {result.backend}, {result.clock} time\n"
    )
    print_table(COLUMNS, [cells(row) for row in result.rows])
    for frames in dict.fromkeys(row.frames for row in result.rows):
        profiled = [row for row in result.rows if row.frames == frames and row.parts_ms]
        print(f"\nmilliseconds by part, of one profiled pass of {frames} frames:\n")
        texts = [part_cells(row)[2:] for row in profiled]
        heads = ("part", *(row.schedule for row in profiled))
        print_table(heads, [(part, *(text[i] for text in texts)) for i, part in enumerate(PARTS)])
    for name, exponent in result.growth().items():
        print(f"\n{name}: time grows with frames to the power of {exponent:.2f}", end="")
    print()


def refuse_output(path: Path, overwrite: bool) -> None:
    """Check that a file of ``--output`` can be written, before minutes of work."""
    if path.is_dir():
        raise Spark3rError(f"--output {path} is a folder, expected a file to write")
    if not path.absolute().parent.is_dir():
        raise Spark3rError(f"--output {path}: there is no folder {path.absolute().parent}")
    if path.exists() and not overwrite:
        raise Spark3rError(f"--output {path} exists: choose another name, or pass --overwrite")


def write_output(path: Path, text: str) -> None:
    """Write the file of ``--output``."""
    try:
        write_file(path, text)
    except OSError as error:
        raise Spark3rError(f"--output {path} cannot be written: {error.strerror}") from error


def _counts(text: str) -> tuple[int, ...]:
    return tuple(parse_count(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"'{text}', expected names with commas between them")
    return names


def _layers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}', expected layer numbers such as 3,4")
    return tuple(int(part) for part in parts)
