"""``spark3r run``: reconstruct footage, dense or reduced, and write the result."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

from ..ranks import Joined, device_of_rank, joined
from .arguments import (
    add_dtype,
    add_family,
    add_json,
    add_model,
    chosen_dtype,
    chosen_family,
    chosen_model,
    default_device,
    is_real,
    parse_count,
    parse_path,
    parse_text,
    usable_device,
)
from .export import FOLDER, FORMATS, parse_formats
from .planning import RENDERED_PATCHES, add_memory_limit, make_plan, plan_early
from .result import print_result
from .run_files import write_files
from .stages import Stages, opened
from .stretch import add_stretch, stretch_of

if TYPE_CHECKING:
    from ..clips import Clip
    from ..families.base import Family
    from ..io.clips import Footage
    from ..profile import Profile
    from ..reconstruction import Reconstruction
    from ..runner import Runner

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

ABOVE = 4
"""Exit status when the deviation is above ``--fail-above``; the files are written."""

EXAMPLES = """examples:
  spark3r run --clip rendered:7 --output out
  spark3r run --model vggt:facebook/VGGT-1B --profile vggt-1b --clip tour.mp4 --output out
  spark3r run --model da3:random-small --clip photos/ --output out --dtype bfloat16

under torchrun one clip is shared by all ranks (docs/several-devices.md)

exit status: 0 done, 1 failed, 2 wrong usage, 4 a deviation is above --fail-above
(the files are written), 130 after Ctrl-C, 143 after SIGTERM
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
    add_model(command, also="; needed for real footage, reference for a rendered scene")
    add_family(command)
    command.add_argument(
        "--clip",
        required=True,
        type=parse_text,
        metavar="CLIP",
        help="a video, a folder of images, or rendered:SEED, a scene that spark3r renders",
    )
    command.add_argument(
        "--output",
        required=True,
        type=parse_path,
        metavar="DIR",
        help="a folder that does not exist yet",
    )
    command.add_argument(
        "--profile",
        type=parse_text,
        metavar="PROFILE",
        help="a shipped profile or a file (default: run dense)",
    )
    command.add_argument(
        "--schedule",
        type=parse_text,
        metavar="NAME",
        help="a schedule of the profile (default: its default)",
    )
    command.add_argument(
        "--compare-dense",
        action="store_true",
        help="run dense as well, and compare the deviation with the profile's evidence",
    )
    command.add_argument(
        "--fail-above",
        type=_percent,
        metavar="X%",
        help=f"with --compare-dense: exit with status {ABOVE} if a deviation is above this; 1%% is "
        "a hundredth of depth, points and scale, 1 degree of rotation and 4 of direction",
    )
    command.add_argument(
        "--frames",
        type=parse_count,
        metavar="N",
        help="number of frames, spread evenly (default: all)",
    )
    add_stretch(command)
    command.add_argument(
        "--mask",
        type=parse_text,
        metavar="FOLDER",
        help="a folder with an image per frame of the same name, black where a pixel is masked "
        "(COLMAP's convention): masked patches leave the keys and values, and the point cloud",
    )
    command.add_argument(
        "--cameras",
        type=parse_text,
        metavar="PATH",
        help="known cameras for a model that takes them (da3): the cameras.json of a run, or a "
        "folder with COLMAP's cameras and images; depth and points are in their scale",
    )
    command.add_argument(
        "--skip-bad", action="store_true", help="leave out frames that cannot be read"
    )
    command.add_argument(
        "--device",
        type=parse_text,
        metavar="D",
        help="cpu, cuda, cuda:1 ... (default: cuda if there is one)",
    )
    add_dtype(command)
    add_memory_limit(command)
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
    command.add_argument(
        "--export",
        type=parse_formats,
        default=(),
        metavar="FORMATS",
        help=f"also write DIR/{FOLDER} for other programs: some of {','.join(FORMATS)}",
    )
    command.add_argument(
        "--no-scene",
        dest="scene",
        action="store_false",
        help="leave out scene.html, the page that shows the cloud, the cameras and the frames",
    )
    command.add_argument(
        "--log-json",
        type=parse_path,
        metavar="FILE",
        help="append one JSON object per stage to this file, with its seconds and peak memory, as "
        "soon as the stage ends or fails",
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
    for flag, given, needed, there in (
        ("--schedule", options.schedule is not None, "--profile", options.profile),
        ("--compare-dense", options.compare_dense, "--profile", options.profile),
        ("--fail-above", options.fail_above is not None, "--compare-dense", options.compare_dense),
    ):
        if given and not there:
            wrong_usage(f"{flag} needs {needed}")
    with joined(options.device) as ranks:
        options.claims_failure = ranks.claims_failure
        with opened(options.log_json if ranks.is_first else None) as log:
            stages = Stages(log, shown=ranks.is_first)
            with stages.whole_run():
                return _reconstruct(options, stages, ranks)


def _reconstruct(options: argparse.Namespace, stages: Stages, ranks: Joined) -> int:
    from ..errors import FamilyError, Spark3rError
    from ..io.clips import check_source
    from ..io.known_cameras import check_cameras, read_cameras
    from ..io.masks import check_masks, read_masks
    from ..io.outputs import new_folder, refuse_folder, refuse_full_disk

    # Mistakes are reported before a model of several GB is loaded.
    for flag, given in (("--mask", options.mask), ("--cameras", options.cameras)):
        if given is not None and ranks.size > 1:
            raise Spark3rError(f"{flag}: several processes cannot share such a clip: use one")
    if ranks.is_first:
        refuse_folder(options.output)
        _refuse_without_pillow()
        check_source(options.clip, options.frames, stretch_of(options))
        if options.mask is not None:
            check_masks(options.mask)
        if options.cameras is not None:
            check_cameras(options.cameras)
    profile, family = _profile(options), chosen_family(options)

    from ..loading.architecture import is_published
    from ..loading.load import REFERENCE_IS_FOR, about, load_model
    from ..reconstruction import reconstruct
    from ..runner import Runner
    from .provenance import other_code, provenance

    device = usable_device(device_of_rank(options.device or default_device()))
    model = chosen_model(
        options, (options.clip,), None if profile is None else profile.model.family
    )
    known = about(model)
    if known.notice:
        stages.say(known.notice)
    if model == "reference" and is_real(options.clip):
        stages.say(REFERENCE_IS_FOR)
    alone = ranks.size == 1
    if options.memory is not None and not alone:
        raise Spark3rError("--memory plans for one process, and torchrun started several")
    early = is_published(model) and family is None
    plan = plan_early(options, model, profile, device, stages) if alone and early else None
    with stages("load"):
        runner = Runner.of(load_model(model, device), family)
        if alone and not early:
            plan = make_plan(options, runner, profile, device, stages)
        if plan is not None:
            options.schedule = plan.schedule_name
        schedule = "dense" if profile is None else options.schedule or profile.default
        origins = provenance(options.command, runner, model, options.profile, schedule)
        if profile is not None:
            _refuse_misfit(runner, profile, options.schedule)
    if other := other_code(origins):
        stages.say(f"note: {other}")
    if options.cameras is not None and runner.family.call_with_cameras is None:
        raise FamilyError(f"--cameras: models of family '{runner.family.name}' take no cameras")
    if options.export and not runner.family.pinhole:
        raise FamilyError(
            f"--export: models of family '{runner.family.name}' predict no pinhole cameras, which "
            "these formats need"
        )
    stages.on(runner.device)
    with stages("read"):
        # Rank 0 reads, so that only it needs the file and the memory for all frames.
        footage = _footage(options, runner) if ranks.is_first else None
        mask = cameras = None
        if options.mask is not None and footage is not None:
            mask = read_masks(options.mask, footage)
        if options.cameras is not None and footage is not None:
            cameras = read_cameras(options.cameras, footage)
        clip = _part(footage, profile, options, runner, ranks)
    if footage is not None:
        _say_footage(stages, footage)
        refuse_full_disk(options.output, footage.clip.images)
    run = partial(
        reconstruct,
        runner.model,
        clip,
        profile,
        schedule=options.schedule,
        family=runner.family,
        compare_dense=options.compare_dense,
        mask=mask,
        cameras=cameras,
        dtype=chosen_dtype(options, device),
        plan=plan,
        say=stages.say,
        stage=stages,
        group=ranks.group,
    )
    if footage is None:
        run()
        return 0
    with new_folder(options.output) as folder:
        made = run()
        record = _record(options, model, runner.family, footage, made, profile, device)
        record["mask"], record["cameras"] = options.mask, options.cameras
        record["masked_percent"] = 0.0 if mask is None else 100 * float((~mask).float().mean())
        record["provenance"] = origins
        above = _above(made, options.fail_above)
        record["plan"] = None if plan is None else list(plan.lines())
        record["above"] = None if options.fail_above is None else above
        record["exit_status"] = ABOVE if above else 0
        record["ranks"] = ranks.size
        with stages("write"):
            record |= write_files(folder, footage, made, record, options, mask, stages.say)
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        print_result(record, options.output)
    if options.export:
        with stages("export"):
            _export(options, stages)
    if above:
        stages.say(f"--fail-above {options.fail_above:g}%: {'; '.join(above)}")
    return ABOVE if above else 0


def _above(made: Reconstruction, percent: float | None) -> list[str]:
    """Return in words which deviations are above the limit of ``--fail-above``."""
    if percent is None:
        return []
    if made.deviation is None:
        return ["the deviation is not known"]
    return made.deviation.above(percent)


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


def _profile(options: argparse.Namespace) -> Profile | None:
    if options.profile is None:
        return None
    from ..profile import load_profile

    profile = load_profile(options.profile)
    profile.schedule(options.schedule)  # raises an error for an unknown name
    return profile


def _footage(options: argparse.Namespace, runner: Runner) -> Footage:
    from ..io.clips import load_clip

    patch_size = runner.family.metadata(runner.root).get("patch_size", 8)
    return load_clip(
        options.clip,
        runner.family,
        frames=options.frames,
        skip_bad=options.skip_bad,
        rendered_size=RENDERED_PATCHES * patch_size,
        stretch=stretch_of(options),
    )


def _part(
    footage: Footage | None,
    profile: Profile | None,
    options: argparse.Namespace,
    runner: Runner,
    ranks: Joined,
) -> Clip:
    """Return the frames of the clip that this rank holds."""
    from ..clips import Clip
    from ..reduction.sharding import deal, unit
    from ..schedule import Schedule

    if footage is not None and ranks.size == 1:
        return footage.clip
    dense = Schedule.dense(runner.depth)
    schedule = dense if profile is None else profile.schedule(options.schedule)

    def starts(frames: int) -> tuple[int, ...]:
        return deal(frames, ranks.size, unit(schedule.resolve(frames)))

    images = ranks.deal(None if footage is None else footage.clip.images, starts)
    return Clip(options.clip, images)


def _say_footage(stages: Stages, footage: Footage) -> None:
    if footage.skipped:
        stages.say(f"{len(footage.skipped)} unreadable and skipped: {_first(footage.skipped)}")
    if footage.passed_over:
        stages.say(
            f"{len(footage.passed_over)} that look like images were passed over: "
            f"{_first(footage.passed_over)}"
        )
    _, _, height, width = footage.clip.images.shape
    stages.say(f"{footage.clip.frames} frames of {width}x{height} pixels from {footage.clip.name}")


def _first(parts: Sequence[str]) -> str:
    return "; ".join(parts[:3]) + " ..." * (len(parts) > 3)


def _record(
    options: argparse.Namespace,
    model: str,
    family: Family,
    footage: Footage,
    made: Reconstruction,
    profile: Profile | None,
    device: str,
) -> dict[str, Any]:
    """Return the record of the run as JSON."""
    from ..env import environment
    from ..loading.load import about
    from ..runner import dtype_name

    known = about(model)
    height, width = made.run.prediction.image_size
    record: dict[str, Any] = {
        "model": model,
        "family": family.name,
        "pinhole": family.pinhole,
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
        "passed_over": list(footage.passed_over),
        "device": device,
        "dtype": dtype_name(made.dtype),
        "seconds": made.run.seconds,
        "peak_memory_mb": made.run.peak_mb,
        "dense": None,
        "deviation": None if made.deviation is None else made.deviation.to_dict(),
        "expected": None if made.expected is None else made.expected.to_dict(),
        "notes": list(made.notes),
        "environment": environment(),
    }
    if made.dense is not None:
        record["dense"] = {"seconds": made.dense.seconds, "peak_memory_mb": made.dense.peak_mb}
    return record


def _export(options: argparse.Namespace, stages: Stages) -> None:
    """Write the exports, after the reconstruction is whole, so that they cannot lose it."""
    from ..io.exports import export_output
    from ..io.outputs import new_folder
    from ..io.reading import read_output

    with new_folder(options.output / FOLDER) as folder:
        export_output(read_output(options.output), folder, options.export, say=stages.say)
