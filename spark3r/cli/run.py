"""``spark3r run``: reconstruct footage, dense or reduced, and write the result."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .arguments import DTYPES, add_json, add_model, parse_count

if TYPE_CHECKING:
    from ..io.clips import Footage
    from ..prediction import Prediction
    from ..profile import Profile
    from ..reconstruction import Reconstruction
    from ..runner import Runner

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

RENDERED_PATCHES = 8
"""Rows and columns of patches of the frames of a rendered scene."""

EXAMPLES = """examples:
  spark3r run --clip rendered:7 --output out
  spark3r run --model vggt:facebook/VGGT-1B --profile vggt-1b --clip tour.mp4 --output out
  spark3r run --model da3:random-small --clip photos/ --output out --dtype bfloat16
"""


def add_run(commands: Subparsers) -> None:
    """Declare ``spark3r run``."""
    command = commands.add_parser(
        "run",
        help="reconstruct a video or a folder of images, dense or reduced",
        description="Reconstruct footage and write depth maps, cameras and a point cloud.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model(command, default="reference")
    command.add_argument(
        "--clip",
        required=True,
        metavar="CLIP",
        help="a video, a folder of images, or rendered:SEED",
    )
    command.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="a folder that does not exist yet"
    )
    command.add_argument(
        "--profile", metavar="PROFILE", help="a shipped profile or a file (default: run dense)"
    )
    command.add_argument(
        "--schedule", metavar="NAME", help="a schedule of the profile (default: its default)"
    )
    command.add_argument(
        "--compare-dense", action="store_true", help="run dense as well and print the deviation"
    )
    command.add_argument(
        "--frames",
        type=parse_count,
        metavar="N",
        help="number of frames, spread evenly (default: all)",
    )
    command.add_argument(
        "--skip-bad", action="store_true", help="leave out frames that cannot be read"
    )
    command.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)"
    )
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="autocast precision of the pass (default: float32, no autocast)",
    )
    command.add_argument(
        "--max-points",
        type=parse_count,
        metavar="N",
        help="largest number of points in the cloud (default: 1000000)",
    )
    command.add_argument(
        "--least-confident",
        type=_percent,
        metavar="PERCENT",
        help="share of pixels, the least confident, to leave out of the cloud (default: 40)",
    )
    add_json(command)
    command.set_defaults(run=partial(_run, command.error))


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"'{text}', expected a percentage from 0 to below 100")
    return value


def _run(wrong_usage: Callable[[str], NoReturn], options: argparse.Namespace) -> int:
    for flag, given in (
        ("--schedule", options.schedule),
        ("--compare-dense", options.compare_dense),
    ):
        if given and not options.profile:
            wrong_usage(f"{flag} needs a --profile")
    from ..io.clips import check_source
    from ..io.outputs import new_folder, refuse_folder

    # Mistakes are reported before a model of several GB is loaded.
    refuse_folder(options.output)
    _refuse_without_pillow()
    check_source(options.clip, options.frames)
    profile = _profile(options)

    import torch

    from ..loading.load import about, load_model
    from ..reconstruction import reconstruct
    from ..runner import Runner

    known = about(options.model)
    if known.notice:
        _say(known.notice)
    device = options.device or _default_device()
    runner = Runner.of(load_model(options.model, device))
    if profile is not None:
        _refuse_misfit(runner, profile, options.schedule)
    footage = _footage(options, runner)
    with new_folder(options.output) as folder:
        made = reconstruct(
            runner.model,
            footage.clip,
            profile,
            schedule=options.schedule,
            family=runner.family,
            compare_dense=options.compare_dense,
            dtype=getattr(torch, options.dtype),
            say=_say,
        )
        record = _record(options, runner.family.name, footage, made, profile, device)
        record["points"] = _write(folder, footage, made.run.prediction, record, options)
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        _print(record, options.output)
    return 0


def _refuse_without_pillow() -> None:
    from ..errors import ClipError
    from ..io.frames import INSTALL

    if find_spec("PIL") is None:
        raise ClipError(f"previews are written with Pillow, which is missing: {INSTALL}")


def _refuse_misfit(runner: Runner, profile: Profile, schedule: str | None) -> None:
    """Raise an error for a profile that does not fit the model, before footage is decoded."""
    from ..patching.apply import apply

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself gives them
        apply(runner.model, profile, schedule=schedule, family=runner.family).remove()


def _say(message: str) -> None:
    print(f"spark3r: {message}", file=sys.stderr, flush=True)


def _profile(options: argparse.Namespace) -> Profile | None:
    if options.profile is None:
        return None
    from ..profile import load_profile

    profile = load_profile(options.profile)
    profile.schedule(options.schedule)  # raises an error for an unknown name
    return profile


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _footage(options: argparse.Namespace, runner: Runner) -> Footage:
    from ..io.clips import load_clip

    patch_size = runner.family.metadata(runner.root).get("patch_size", 8)
    footage = load_clip(
        options.clip,
        runner.family,
        frames=options.frames,
        skip_bad=options.skip_bad,
        rendered_size=RENDERED_PATCHES * patch_size,
    )
    if footage.skipped:
        _say(f"{len(footage.skipped)} unreadable and skipped: {'; '.join(footage.skipped[:3])}")
    _, _, height, width = footage.clip.images.shape
    _say(f"{footage.clip.frames} frames of {width}x{height} pixels from {footage.clip.name}")
    return footage


def _record(
    options: argparse.Namespace,
    family: str,
    footage: Footage,
    made: Reconstruction,
    profile: Profile | None,
    device: str,
) -> dict[str, Any]:
    """Return the record of the run as JSON."""
    from ..env import environment
    from ..loading.load import about
    from ..runner import dtype_name

    known = about(options.model)
    height, width = made.run.prediction.image_size
    record: dict[str, Any] = {
        "model": options.model,
        "family": family,
        "weights": known.weights,
        "random_weights": known.random,
        "profile": options.profile,
        "status": None if profile is None else profile.status,
        "schedule": "dense" if profile is None else options.schedule or profile.default,
        "clip": options.clip,
        "frames": footage.clip.frames,
        "height": height,
        "width": width,
        "skipped": list(footage.skipped),
        "device": device,
        "dtype": dtype_name(made.dtype),
        "seconds": made.run.seconds,
        "peak_memory_mb": made.run.peak_mb,
        "dense": None,
        "deviation": None if made.deviation is None else made.deviation.to_dict(),
        "notes": list(made.notes),
        "environment": environment(),
    }
    if made.dense is not None:
        record["dense"] = {"seconds": made.dense.seconds, "peak_memory_mb": made.dense.peak_mb}
    return record


def _write(
    folder: Path,
    footage: Footage,
    prediction: Prediction,
    record: dict[str, Any],
    options: argparse.Namespace,
) -> int:
    from ..io.outputs import LEAST_CONFIDENT_PERCENT, MAX_POINTS, write_outputs

    _say("writing")
    percent = options.least_confident
    return write_outputs(
        folder,
        footage,
        prediction,
        record,
        max_points=options.max_points or MAX_POINTS,
        least_confident_percent=LEAST_CONFIDENT_PERCENT if percent is None else percent,
    )


def _print(record: dict[str, Any], output: Path) -> None:
    weights = "random weights" if record["random_weights"] else f"weights {record['weights']}"
    schedule = record["schedule"]
    if record["profile"] is not None:
        schedule = f"schedule '{schedule}' of {record['profile']}"
    print(
        f"{record['model']} ({weights}), {schedule}, {record['frames']} frames of "
        f"{record['width']}x{record['height']}, {record['dtype']} on {record['device']}"
    )
    print(f"pass: {_cost(record)}")
    dense, figures = record["dense"], record["deviation"]
    if dense is not None:
        print(
            f"dense: {_cost(dense)}; reduced is {dense['seconds'] / record['seconds']:.2f}x as fast"
        )
        drift = figures["scale_drift"]
        shown = {
            "depth": f"{100 * figures['depth']:.2f}%",
            "rotation": f"{figures['rotation_deg']:.3f}°",
            "translation": f"{figures['translation_deg']:.3f}°",
            "points": f"{100 * figures['points']:.2f}%",
            "scale drift": "undefined" if drift is None else f"{100 * drift:.2f}%",
        }
        print(f"deviation from dense: {', '.join(' '.join(item) for item in shown.items())}")
    print(
        f"written to {output}: depth/, confidence/, preview/, cameras.json, trajectory.txt, "
        f"points.ply ({record['points']} points), run.json"
    )


def _cost(record: dict[str, Any]) -> str:
    memory = record["peak_memory_mb"]
    return f"{record['seconds']:.2f} s, peak memory " + (
        "unknown" if memory is None else f"{memory:.0f} MB above model and clip"
    )
