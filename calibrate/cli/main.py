"""The ``calibrate`` command: parsing, inputs, outputs and exit status.

Nothing heavy is imported before arguments are parsed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from spark3r.cli.arguments import (
    UsageError,
    chosen_dtype,
    chosen_family,
    chosen_model,
    default_device,
    is_real,
    usable_device,
)
from spark3r.cli.failure import failure_text
from spark3r.cli.termination import INTERRUPTED, Terminated, raise_on_sigterm, word_and_status
from spark3r.errors import ProfileExistsError, Spark3rError
from spark3r.ranks import RankError, device_of_rank
from spark3r.timing import Timer

from ..budget import Budget, BudgetError, UnreachableBudgetError, parse_budget
from ..defaults import EFFORTS, FRAMES, TIMER, Source
from ..progress import Reporter, StepTimes, TerminalReporter
from .arguments import DESCRIPTION, EXAMPLES, declare, parser

if TYPE_CHECKING:
    from torch import nn

    from spark3r.families.base import Family

    from ..clips import Split
    from ..report.result import Calibration
    from ..search.joining import Joined
    from ..settings import Settings

DONE, FAILED, USAGE, UNREACHABLE, MISSED = 0, 1, 2, 3, 4

BUSY_LOAD = 0.5
"""Load of the last minute per processor above which the machine counts as busy."""

LESS_MEMORY = "give fewer --frames or --target-frames"


def main(
    arguments: Sequence[str] | None = None,
    *,
    reporter: Reporter | None = None,
    timer: Timer = TIMER,
) -> int:
    """Run the command and return its exit status.

    It is 0 if done, 1 if failed, 2 after wrong usage, 3 if the budget cannot be reached, 4 if what
    was exported misses the budget or the deviation, 130 after Ctrl-C and 143 after SIGTERM.

    Args:
        arguments: Command-line arguments; None takes those of the process.
        reporter: Receives progress and messages; None shows them on stderr unless ``--quiet``.
        timer: Takes the latencies.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    command = parser()
    options = command.parse_args(arguments)
    _sleep_where_busy()
    return run_command(options, command.error, reporter, timer)


def add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare ``spark3r calibrate``, the same command; spark3r finds this by an entry point."""
    command = commands.add_parser(
        "calibrate",
        help="find a schedule for a latency budget, and write its profile",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    declare(command)

    def run(options: argparse.Namespace) -> int:
        _sleep_where_busy()
        return run_command(options, command.error)

    command.set_defaults(run=run)


def _sleep_where_busy() -> None:
    """Let threads sleep while they wait for one another, if other programs use the processors.

    Otherwise they spend CPU time on waiting, for as long as the others hold a processor: a dense
    pass of the reference model took twice the CPU time. OpenMP reads this when torch is imported.
    """
    if "torch" in sys.modules or not hasattr(os, "getloadavg"):
        return
    if os.getloadavg()[0] > BUSY_LOAD * (os.cpu_count() or 1):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def run_command(
    options: argparse.Namespace,
    wrong_usage: Callable[[str], NoReturn],
    reporter: Reporter | None = None,
    timer: Timer = TIMER,
) -> int:
    """Run the command with parsed options, and return its exit status; see `main`.

    Args:
        options: Options from a parser with the arguments of `declare`, and ``debug``.
        wrong_usage: Function that shows a message and ends the process.
        reporter: As for `main`.
        timer: As for `main`.
    """
    try:
        budget = None if options.budget is None else parse_budget(options.budget)
    except BudgetError as error:
        wrong_usage(str(error))
    if options.max_deviation is not None and options.objective_from not in (None, "deviation"):
        wrong_usage("--max-deviation judges by deviation: leave out --objective-from")
    if options.resume and options.profile is not None:
        wrong_usage("--resume continues a search, and with --from there is none")
    if options.join and (options.profile is not None or options.dry_run):
        wrong_usage("--join runs trials of another process: leave out --from and --dry-run")
    if options.resume and options.effort == "quick" and options.trials is None:
        wrong_usage("--resume continues a search, and --effort quick has none")
    if options.dry_run and options.profile is not None:
        wrong_usage("--dry-run plans a whole calibration, and --from measures only the answer")
    try:
        options.model = chosen_model(options, _footage(options), None)
    except UsageError as error:
        print(f"calibrate: {failure_text(error)}", file=sys.stderr)
        return USAGE
    sys.path.append(os.getcwd())  # for a model factory in the working directory, as python -m
    if int(os.environ.get("RANK", "0")) > 0 and "TORCHELASTIC_RUN_ID" in os.environ:
        return _serve(options, budget)
    try:
        with raise_on_sigterm():
            return _calibrate(options, budget, reporter, timer)
    except (KeyboardInterrupt, Terminated) as stop:
        word, status = word_and_status(stop)
        return _failed(options, status, f"{word}: {_what_is_kept(options)}")
    except Exception as error:
        status = UNREACHABLE if isinstance(error, UnreachableBudgetError) else FAILED
        if options.debug:
            traceback.print_exc()
        return _failed(options, status, failure_text(error, LESS_MEMORY))


def _failed(options: argparse.Namespace, status: int, text: str) -> int:
    """Say why the command ends, and return the status.

    The status is in the JSON object as well, because torchrun turns every failure into 1.
    """
    if not options.debug:
        print(f"calibrate: {text}", file=sys.stderr)
    if options.json:
        print(json.dumps({"status": status, "error": text}))
    return status


def _serve(options: argparse.Namespace, budget: Budget | None) -> int:
    """Run passes for rank 0, which alone says what goes wrong.

    If the inputs cannot be read here, rank 0 gets the error as the answer to its first request.
    """
    from ..pipeline import serve
    from ..ranks import Ranks

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what Ctrl-C means
    ranks = Ranks.of_environment()
    try:
        error: Exception | None = None
        try:
            inputs = _read_inputs(options, budget, _storage(options), Reporter())
        except Exception as failure:
            error = failure
        with ranks.connected():
            if error is not None:
                ranks.refuse(error)
                return FAILED
            serve(inputs.model, inputs.split, inputs.settings, ranks, family=inputs.family)
    except RankError as lost:
        if ranks.rank == 1:
            print(f"calibrate: {failure_text(lost)}", file=sys.stderr)
        return FAILED
    return DONE


def _footage(options: argparse.Namespace) -> tuple[str, ...]:
    """Return all footage that the options name."""
    return (*(options.clip or ()), *(options.held_out or ()))


def _calibrate(
    options: argparse.Namespace, budget: Budget | None, reporter: Reporter | None, timer: Timer
) -> int:
    if options.dry_run:
        lines = _plan(options, budget)
        print(json.dumps({"plan": lines}) if options.json else "\n".join(lines))
        return DONE
    output, storage = _output(options), _storage(options)
    if options.join:
        from ..search.storage import require_shared

        require_shared(options.storage)
    else:
        _check_output(output, storage, options.resume)
    if isinstance(storage, str):
        from ..search.storage import check_database

        check_database(storage)

    from ..pipeline import join, run
    from ..ranks import Ranks

    ranks = Ranks.of_environment()
    if reporter is None:
        reporter = Reporter() if options.quiet else TerminalReporter()
    times = StepTimes(reporter)
    with reporter:
        inputs = _read_inputs(options, budget, storage, times)
        model, split, settings, family = inputs.model, inputs.split, inputs.settings, inputs.family
        with ranks.connected():
            if options.join:
                joined = join(model, split, settings, family=family, reporter=reporter, ranks=ranks)
                return _show_joined(joined, options)
            result = run(
                model,
                split,
                settings,
                from_profile=inputs.from_profile,
                family=family,
                reporter=times,
                timer=timer,
                ranks=ranks,
            )
    return _write(result, output, options)


def _trials(options: argparse.Namespace) -> int:
    if options.trials is None:
        return EFFORTS[options.effort].trials
    return int(options.trials)


def _plan(options: argparse.Namespace, budget: Budget | None) -> list[str]:
    from ..dry_run import Request, clip_counts, plan_lines

    clips, held_out = options.clip or (), options.held_out or ()
    filmed = [each for each in (*clips, *held_out) if not each.startswith("rendered:")]
    for each in filmed:
        if not Path(each).exists():
            raise Spark3rError(f"clip '{each}': there is no such file or folder")
    judged_by: Source = "deviation" if filmed or budget is None else "error"
    request = Request(
        budget=budget,
        goal_text=f"--max-deviation {100 * options.max_deviation:g}%"
        if budget is None
        else f"--budget {budget.text}",
        clips=clip_counts(len(clips), len(held_out), options.effort),
        source=options.objective_from or judged_by,
        model=options.model,
        frames=options.frames or FRAMES,
        target_frames=options.target_frames,
        trials=_trials(options),
        is_known=options.model in ("reference", "reference:random")
        and options.device in (None, "cpu")
        and options.size is None
        and not filmed,
    )
    return plan_lines(request)


@dataclass(frozen=True)
class _Inputs:
    """What the options name: the model, the clips, the settings and an earlier profile."""

    model: nn.Module
    family: Family
    split: Split
    settings: Settings
    from_profile: Path | None


def _read_inputs(
    options: argparse.Namespace, budget: Budget | None, storage: str | Path, reporter: Reporter
) -> _Inputs:
    from spark3r.loading.load import REFERENCE_IS_FOR, about, load_model
    from spark3r.profile import Profile, profile_path
    from spark3r.runner import Runner

    from ..measure.earlier_profile import require_holds_here
    from ..settings import Settings

    from_profile, profile, frames = None, None, options.frames or FRAMES
    if (
        options.profile is not None
    ):  # a profile that cannot be read is refused before clips are made
        from_profile = profile_path(options.profile)
        profile = Profile.load(from_profile)
        frames = options.frames or max(FRAMES, profile.schedule().length.min_frames)
    named = chosen_family(options)
    known = about(options.model)
    if known.notice:
        reporter.say(known.notice)
    if options.model == "reference" and any(map(is_real, _footage(options))):
        reporter.say(REFERENCE_IS_FOR)
    device = usable_device(_device(options))
    model = load_model(options.model, device)
    runner = Runner.of(model, named)
    family = runner.family
    if from_profile is not None and profile is not None:  # before clips are rendered
        require_holds_here(from_profile, profile, runner, options.model)
    settings = Settings(
        budget=budget,
        max_deviation=options.max_deviation,
        target_frames=options.target_frames,
        trials=_trials(options),
        timing_s=EFFORTS[options.effort].timing_s,
        time_limit_s=options.time_limit,
        objective=options.objective,
        source=options.objective_from,
        seed=options.seed,
        storage=storage,
        resume=options.resume,
        cache=_cache_folder(),
        name=options.model,
        weights=known.weights,
        dtype=chosen_dtype(options, device),
    )
    patch_size = family.metadata(runner.root).get("patch_size", 8)
    split = _split(options, frames, family, patch_size, reporter)
    return _Inputs(model, family, split, settings, from_profile)


def _device(options: argparse.Namespace) -> str:
    """Return the device of this process: each rank of a node has a GPU of its own."""
    return device_of_rank(str(options.device or default_device()))


def _write(result: Calibration, output: Path, options: argparse.Namespace) -> int:
    """Write the profile and its report, print the result, and return the exit status."""
    from ..report.page import write_report
    from ..report.summary import missed, print_json, print_summary

    why = missed(result)
    status = INTERRUPTED if result.interrupted else DONE if why is None else MISSED

    def show(written: Path | None, report: tuple[Path, ...], status: int) -> None:
        if options.json:
            print_json(result, written, report, status)
        else:
            print_summary(result, written, report)

    try:
        written = _save(result, output, options.resume)
    except (OSError, Spark3rError):
        show(None, (), FAILED)  # the measurements are shown even if they cannot be saved
        options.json = False  # the error is not a second object
        raise
    report: tuple[Path, ...] = ()
    try:
        report = write_report(result, written)
    except OSError as error:
        print(
            f"calibrate: the report could not be written, {failure_text(error, LESS_MEMORY)}",
            file=sys.stderr,
        )
    except (KeyboardInterrupt, Terminated) as stop:
        word, status = word_and_status(stop)
        return _failed(options, status, f"{word}: {written} is there, its report is not")
    show(written, report, status)
    if status == MISSED:
        print(f"calibrate: the goal is missed: {why}", file=sys.stderr)
    return status


def _show_joined(joined: Joined, options: argparse.Namespace) -> int:
    """Print what a process that joined a search did, and return the exit status."""
    if options.json:
        print(json.dumps({"trials_here": joined.ran, "trials": joined.trials}))
    else:
        print(
            f"{joined.ran} of {joined.trials} trials ran here; the process that began the search "
            "exports its profile"
        )
    return DONE


def _what_is_kept(options: argparse.Namespace) -> str:
    """Return what an ended command left, and how to go on."""
    if options.dry_run or options.profile is not None:
        return "there is nothing to export, so the same command starts again"
    if options.join:
        return "the trial that ran here runs again elsewhere, and the search goes on without this"
    storage = _storage(options)
    if isinstance(storage, Path) and not storage.exists():
        return (
            "the search had not begun; the same command measures only the sensitivities that are "
            "not stored yet"
        )
    kept = storage if isinstance(storage, Path) else "the --storage"
    return f"finished trials are kept in {kept}; the same command with --resume continues"


def _storage(options: argparse.Namespace) -> str | Path:
    return options.storage or _output(options).with_suffix(".journal")


def _output(options: argparse.Namespace) -> Path:
    if options.output is not None:
        return options.output
    goal = options.budget
    if goal is None:
        goal = f"within {100 * options.max_deviation:g}%"
    text = f"{options.model}-{goal.replace('/', '-per-')}".replace("%", "pct")
    return Path(re.sub(r"[^A-Za-z0-9.-]+", "-", text) + ".json")


def _check_output(output: Path, storage: str | Path, resume: bool) -> None:
    """Refuse at once an output that could not be written after minutes of work.

    Raises:
        Spark3rError: If the file exists and is not to be resumed, or its folder does not exist or
            is read-only.
    """
    if output.suffix != ".json":
        raise Spark3rError(f"--output {output} does not end in .json, like every profile")
    if output.exists() and isinstance(storage, Path) and not storage.exists():
        raise Spark3rError(
            f"{output} exists already, and {storage} does not, so there is no search to --resume: "
            "choose another --output"
        )
    if output.exists() and not resume:
        raise Spark3rError(
            f"{output} exists already: choose another --output, or --resume its search"
        )
    folder = output.absolute().parent
    if not folder.is_dir():
        raise Spark3rError(f"--output {output}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise Spark3rError(f"--output {output}: the folder {folder} is read-only")


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spark3r"


def _split(
    options: argparse.Namespace, frames: int, family: Family, patch_size: int, reporter: Reporter
) -> Split:
    from .clips import clips_by_role, reader

    return clips_by_role(
        options.clip or (),
        options.held_out or (),
        frames,
        reader(family, options.size or 8 * patch_size, options.skip_bad, _cache_folder()),
        reporter,
        options.effort,
        searches=options.profile is None,
    )


def _save(result: Calibration, output: Path, resume: bool) -> Path:
    """Write the profile and return its path. A name that is taken meanwhile gets a number."""
    path = output
    for number in range(2, 100):
        try:
            result.profile.save(path, overwrite=resume)
        except ProfileExistsError:
            path = output.with_stem(f"{output.stem}-{number}")
        else:
            return path
    raise Spark3rError(f"{output} and 98 numbered names exist already: choose another --output")
