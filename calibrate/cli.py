"""The ``calibrate`` command: parsing, exit status, progress, and how results are told.

Nothing heavy is imported before arguments are parsed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spark3r.errors import Spark3rError

from .arguments import parser
from .budget import Budget, BudgetError, UnreachableBudgetError, parse_budget

if TYPE_CHECKING:
    from torch import nn

    from spark3r.clips import Clip

    from .settings import Settings
    from .splits import Split
    from .steps import Progress

DONE, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130

CALIBRATION_CLIPS = 12
HELD_OUT_CLIPS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    It is 0 when done, 1 when failed, 2 after wrong usage, 3 when the budget is not reachable and
    130 when interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    command = parser()
    options = command.parse_args(arguments)
    try:
        budget = parse_budget(options.budget)
    except BudgetError as error:
        command.error(str(error))
    sys.path.append(os.getcwd())  # a model factory may stand beside the user, as with python -m
    try:
        return _calibrate(options, budget)
    except KeyboardInterrupt:
        print("calibrate: interrupted before there was anything to export", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        else:
            print(f"calibrate: {_told(error)}", file=sys.stderr)
        return UNREACHABLE if isinstance(error, UnreachableBudgetError) else FAILED


def _told(error: Exception) -> str:
    from spark3r.memory import is_out_of_memory

    if isinstance(error, Spark3rError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory: give fewer --frames or --target-frames"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return (
        f"internal error, {type(error).__name__}: {error} "
        "(--debug shows where; please report it with `python -m spark3r.env`)"
    )


def _calibrate(options: argparse.Namespace, budget: Budget) -> int:
    output = options.output or _default_output(options.model, budget)
    if not options.dry_run:
        _check_output(output, options.resume)

    from spark3r.families import detect
    from spark3r.loading import load_model

    from .calibration import run
    from .progress import Reporter
    from .settings import Settings

    model = load_model(options.model, options.device)
    family = detect(model)
    settings = Settings(
        budget=budget,
        target_frames=options.target_frames,
        trials=options.trials,
        timeout_s=options.timeout,
        objective=options.objective,
        source=options.objective_from,
        seed=options.seed,
        storage=options.storage or output.with_suffix(".journal"),
        resume=options.resume,
        cache=_cache_folder(),
        name=options.model,
    )
    with Reporter(quiet=options.quiet) as reporter:
        split = _split(options, family.facts(model).get("patch_size", 8), reporter.progress)
        if options.dry_run:
            return _dry_run(model, split, settings)
        result = run(
            model, split, settings, family=family, progress=reporter.progress, say=reporter.say
        )
    result.profile.save(output, overwrite=options.resume)

    from .report import write_report
    from .summary import print_json, print_summary

    report = write_report(result, output)
    (print_json if options.json else print_summary)(result, output, report)
    return INTERRUPTED if result.interrupted else DONE


def _default_output(model: str, budget: Budget) -> Path:
    text = f"{model}-{budget.text}".replace("%", "pct").replace("/", "-per-")
    return Path(re.sub(r"[^A-Za-z0-9.-]+", "-", text) + ".json")


def _check_output(output: Path, resume: bool) -> None:
    """Refuse at once what could not be written after minutes of work.

    Raises:
        Spark3rError: If the file exists, or its folder does not or is read-only.
    """
    if output.suffix != ".json":
        raise Spark3rError(f"--output {output} does not end in .json, the form of a profile")
    if output.exists() and not resume:
        raise Spark3rError(f"{output} exists already: choose another --output, or move it away")
    folder = output.absolute().parent
    if not folder.is_dir():
        raise Spark3rError(f"--output {output}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise Spark3rError(f"--output {output}: the folder {folder} is read-only")


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spark3r"


def _split(options: argparse.Namespace, patch_size: int, progress: Progress) -> Split:
    from spark3r.reference.seeds import CALIBRATION, EVALUATION

    from .splits import split_clips

    seeds = options.clip or list(CALIBRATION[:CALIBRATION_CLIPS])
    held_out = options.held_out or ([] if options.clip else list(EVALUATION[:HELD_OUT_CLIPS]))
    size = options.size or 8 * patch_size
    clips = _rendered([*seeds, *held_out], options.frames, size, progress)
    return split_clips(clips[: len(seeds)], clips[len(seeds) :])


def _rendered(seeds: Sequence[int], frames: int, size: int, progress: Progress) -> list[Clip]:
    from spark3r.reference.render import rendered_clip

    clips = []
    for number, seed in enumerate(seeds):
        progress("rendering", number, len(seeds))
        clips.append(rendered_clip(seed, frames, size, size))
    progress("rendering", len(seeds), len(seeds))
    return clips


def _dry_run(model: nn.Module, split: Split, settings: Settings) -> int:
    from .plan import plan_lines

    for line in plan_lines(model, split, settings):
        print(line)
    return DONE
