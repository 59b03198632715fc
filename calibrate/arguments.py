"""The arguments of the command ``calibrate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from spark3r import __version__

FRAMES = 24
TRIALS = 40

EXAMPLES = """examples:
  calibrate --budget 2.5x
        the reference model on rendered clips, 2.5 times as fast as dense
  calibrate --budget 30ms --target-frames 256 --trials 100 --seed 1
        256 frames in 7.68 s; a longer search
  calibrate --budget 40% --model my_package.models:make_vggt --objective-from deviation --json
        a model of yours, as faithful to dense as possible, the result as JSON

exit status: 0 done, 1 failed, 2 wrong usage, 3 budget not reachable, 130 interrupted (the best so
far is exported if the search had begun, and --resume goes on)
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    whole = argparse.ArgumentParser(
        prog="calibrate",
        description="Profile how much every global attention layer bears, search a schedule that "
        "meets a latency budget, verify it on held-out clips and write its profile.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="version", version=f"calibrate {__version__}")
    whole.add_argument("--debug", action="store_true", help="show a traceback on failure")
    _add_budget(whole.add_argument_group("budget"))
    _add_input(whole.add_argument_group("model and clips"))
    _add_search(whole.add_argument_group("search"))
    _add_output(whole.add_argument_group("output"))
    return whole


def _add_budget(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--budget",
        required=True,
        metavar="B",
        help="30ms or 30ms/frame (per frame), 1.5s/clip, 10x (times as fast as dense) or 25%% (of "
        "dense latency)",
    )
    group.add_argument(
        "--target-frames",
        type=_count,
        metavar="N",
        help="frames of the clips that the budget must hold for (default: the shortest of 128, "
        "256, 512, 1024 where it lies clear of dense and of the wall)",
    )


def _add_input(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        default="reference",
        metavar="NAME",
        help="reference, reference:random or package.module:factory (default: reference)",
    )
    group.add_argument(
        "--clip",
        action="append",
        type=_rendered,
        metavar="rendered:SEED",
        help="a rendered clip to calibrate on; may be repeated (default: 12 of calibration seeds)",
    )
    group.add_argument(
        "--held-out",
        action="append",
        type=_rendered,
        metavar="rendered:SEED",
        help="a rendered clip that only reported figures are measured on; may be repeated "
        "(default: 8 of evaluation seeds, or with --clip a quarter of those clips)",
    )
    group.add_argument(
        "--frames",
        type=_count,
        default=FRAMES,
        metavar="N",
        help=f"frames of the clips that quality is measured on (default: {FRAMES})",
    )
    group.add_argument(
        "--size",
        type=_count,
        metavar="PIXELS",
        help="height and width of rendered clips (default: 8 patches of the model)",
    )
    group.add_argument(
        "--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N (default: cpu)"
    )


def _add_search(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--objective",
        choices=("balanced", "depth", "pose", "points"),
        default="balanced",
        help="which metrics count (default: balanced: depth, rotation, translation direction)",
    )
    group.add_argument(
        "--objective-from",
        choices=("error", "consistency", "deviation"),
        help="judge by ground truth, by agreement of frames, or by faithfulness to dense "
        "(default: error)",
    )
    group.add_argument(
        "--trials",
        type=_count,
        default=TRIALS,
        metavar="N",
        help=f"schedules to try beyond those the search starts from (default: {TRIALS})",
    )
    group.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="seconds of search after which no further trial begins (default: no limit)",
    )
    group.add_argument(
        "--storage",
        metavar="URL",
        help="Optuna storage of the trials (default: a journal file beside the output)",
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with the search that was interrupted"
    )
    group.add_argument(
        "--seed", type=_whole, default=0, metavar="N", help="of everything random (default: 0)"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the profile, a .json file that must not exist yet (default: MODEL-BUDGET.json); the "
        "report (.html) and its pictures (.png) stand beside it",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="print the planned work and its time, then stop"
    )
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")
    group.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}', expected an integer of at least 1")
    return int(text)


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}', expected an integer of at least 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}', expected a number of seconds above 0")
    return seconds


def _rendered(text: str) -> int:
    kind, _, seed = text.partition(":")
    if kind != "rendered" or not seed.isascii() or not seed.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}', expected rendered:SEED such as rendered:7")
    return int(seed)
