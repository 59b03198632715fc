"""The arguments of the command ``calibrate``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from spark3r import __version__
from spark3r.cli.arguments import add_dtype, add_family, add_model, parse_path, parse_text

from ..defaults import EFFORTS, FRAMES, TARGET_LENGTHS, TRIALS

EXAMPLES = """examples:
  calibrate --budget 2.5x
        the reference model on rendered clips, 2.5 times as fast as dense
  calibrate --budget 30ms --model vggt:facebook/VGGT-1B --clip walk.mp4 --target-frames 500 \\
      --time-limit 10min
        VGGT on your footage, in bfloat16 if there is a GPU: clips of 500 frames in 15 s
  calibrate --budget 25% --from reference-2.5x.json
        another budget from the measurements in a profile, in seconds

exit status: 0 done, 1 failed, 2 wrong usage, 3 budget not reachable, 4 exported, but the budget or
the deviation is missed, 130 Ctrl-C (after the search
has begun, the best schedule so far is verified and exported), 143 SIGTERM (stops at once); after
both, --resume continues the search
"""


DESCRIPTION = (
    "Profile how sensitive every global attention layer is, search a schedule that meets a latency "
    "budget, verify it on held-out clips and write its profile."
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command ``calibrate``."""
    whole = argparse.ArgumentParser(
        prog="calibrate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="version", version=f"calibrate {__version__}")
    whole.add_argument(
        "--debug", action="store_true", help="show a traceback on failure (default: one line)"
    )
    declare(whole)
    return whole


def declare(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of a calibration."""
    _add_goal(command.add_argument_group("goal (one of the first two)"))
    _add_input(command.add_argument_group("model and clips"))
    _add_search(command.add_argument_group("search"))
    _add_output(command.add_argument_group("output"))


def _add_goal(group: argparse._ArgumentGroup) -> None:
    either = group.add_mutually_exclusive_group(required=True)
    either.add_argument(
        "--budget",
        metavar="B",
        help="30ms or 30ms/frame (per frame), 1.5s/clip, 10x (times as fast as dense) or 25%% (of "
        "dense latency)",
    )
    either.add_argument(
        "--max-deviation",
        type=_percentage,
        metavar="X%",
        help="instead of a budget: the fastest schedule that deviates no more than this from "
        "dense; 1%% is a hundredth of depth, 1 degree of rotation and 4 of direction",
    )
    group.add_argument(
        "--target-frames",
        type=_integer(1),
        metavar="N",
        help="frames of the clips that the budget must hold for (default: the shortest of "
        f"{', '.join(map(str, TARGET_LENGTHS))} at which the budget has a margin from dense and "
        f"from the wall; {TARGET_LENGTHS[0]} with --max-deviation; with --from the profile's)",
    )
    group.add_argument(
        "--from",
        dest="profile",
        type=parse_text,
        metavar="PROFILE",
        help="a measured profile of the same model and device, as a file or the name of a shipped "
        "one: solve for the goal with its sensitivities and latency model, and measure only the "
        "answer. Nothing is searched, so the search's options have no effect (default: measure "
        "everything)",
    )


def _add_input(group: argparse._ArgumentGroup) -> None:
    add_model(group, also="; needed for real footage, reference for rendered scenes")
    add_family(group)
    group.add_argument(
        "--clip",
        action="append",
        type=_footage,
        metavar="PATH",
        help="a folder of images, a video, or rendered:SEED, to calibrate on; may be repeated "
        "(default: rendered scenes of calibration seeds)",
    )
    group.add_argument(
        "--held-out",
        action="append",
        type=_footage,
        metavar="PATH",
        help="footage for the reported figures only; may be repeated (default: rendered scenes of "
        "evaluation seeds, or with --clip a quarter of that footage)",
    )
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out images that cannot be read, and count them (default: fail)",
    )
    group.add_argument(
        "--frames",
        type=_integer(2, ": a single frame has no pose to judge"),
        metavar="N",
        help=f"frames of the clips that quality is measured on (default: {FRAMES}, with --from at "
        "least as many as the profile holds for)",
    )
    group.add_argument(
        "--size",
        type=_integer(1),
        metavar="PIXELS",
        help="height and width of rendered clips in pixels (default: 8 patches of the model)",
    )
    group.add_argument(
        "--device",
        type=parse_text,
        metavar="D",
        help="cpu, cuda or cuda:N (default: cuda if there is one, otherwise cpu)",
    )
    add_dtype(group)


def _add_search(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--objective",
        choices=("balanced", "depth", "pose", "points"),
        default="balanced",
        help="metrics that count (default: balanced, that is depth, rotation and translation "
        "direction)",
    )
    group.add_argument(
        "--objective-from",
        choices=("error", "consistency", "deviation"),
        help="judge by ground truth, by agreement of frames, or by faithfulness to dense "
        "(default: error if all clips have ground truth, otherwise deviation)",
    )
    group.add_argument(
        "--effort",
        choices=tuple(EFFORTS),
        default="normal",
        help="quick searches nothing, exports the best schedule by the sensitivities, and takes "
        "about half as long; normal tries some 25 schedules on clips and selects among their best; "
        "thorough has twice as many clips, 40 trials and longer timings, and takes about twice as "
        "long (default: normal)",
    )
    group.add_argument(
        "--time-limit",
        type=_duration,
        metavar="T",
        help="time for the whole command, such as 90s, 5min or 1h: fewer trials and clips are "
        "planned if needed, and the plan is printed (default: no limit)",
    )
    group.add_argument(
        "--trials",
        type=_integer(1),
        metavar="N",
        help="schedules to try beyond the initial ones, instead of as many as the effort has "
        f"(default: {TRIALS})",
    )
    group.add_argument(
        "--storage",
        type=parse_text,
        metavar="URL",
        help="Optuna storage of the trials, such as sqlite:///study.db, or a database server that "
        "several processes share, such as postgresql://user@host/base (default: a journal file "
        "beside the output)",
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--resume",
        action="store_true",
        help="continue the search that was interrupted (default: begin a new one)",
    )
    either.add_argument(
        "--join",
        action="store_true",
        help="run trials of the search that the same command without --join began in the same "
        "--storage, a database server, and export nothing (default: begin a search)",
    )
    group.add_argument(
        "--seed", type=_integer(0), default=0, metavar="N", help="seed of the search (default: 0)"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        type=parse_path,
        metavar="FILE",
        help="file of the profile, ending in .json, that does not exist yet (default: "
        "MODEL-GOAL.json); the report (.html) and its pictures (.png) are written beside it",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print the planned work, roughly and at once, and load or measure nothing",
    )
    group.add_argument("--quiet", action="store_true", help="show no progress on stderr")
    group.add_argument(
        "--json", action="store_true", help="print one JSON object (default: a table)"
    )


def _integer(least: int, hint: str = "") -> Callable[[str], int]:
    """Return the function that reads an integer of at least ``least``."""

    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"'{text}', expected an integer of at least {least}{hint}"
            )
        return int(text)

    return read


_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def _duration(text: str) -> float:
    expected = "a duration above 0 such as 90s, 5min or 1h"
    for unit, seconds in _UNITS.items():
        number = text.removesuffix(unit)
        if number != text and number[-1:].isdigit():
            return seconds * _positive(number, expected)
    raise argparse.ArgumentTypeError(f"'{text}', expected {expected}")


def _percentage(text: str) -> float:
    if not text.endswith("%"):
        raise argparse.ArgumentTypeError(f"'{text}', expected a percentage such as 1%")
    return _positive(text[:-1], "a percentage above 0 such as 1%") / 100


def _positive(text: str, expected: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}', expected {expected}")
    return number


def _footage(text: str) -> str:
    kind, colon, seed = parse_text(text).partition(":")
    if kind == "rendered" and not (colon and seed.isascii() and seed.isdigit()):
        raise argparse.ArgumentTypeError(f"'{text}', expected rendered:SEED such as rendered:7")
    return text
