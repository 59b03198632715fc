"""``spark3r verify``: check published weights on this machine, and write what was found."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from datetime import date
from typing import TYPE_CHECKING, Any

from .arguments import (
    add_dtype,
    add_json,
    add_model,
    chosen_dtype,
    default_device,
    is_real,
    parse_count,
    parse_path,
    parse_text,
    usable_device,
)
from .tables import print_table

if TYPE_CHECKING:
    from ..clips import Clip
    from ..evidence import Evidence
    from ..runner import Runner

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

FORMAT, VERSION = "spark3r-evidence", 1
"""Marks of the file."""

FRAMES = 24
RENDERED_PATCHES = 16
"""Rows and columns of patches of a rendered frame. The reference model has its own."""


def add_verify(commands: Subparsers) -> None:
    """Declare ``spark3r verify``."""
    command = commands.add_parser(
        "verify",
        help="check weights on this machine, and write the evidence as one file",
        description="Check that a model stays the same bit for bit under factors of 1, that its "
        "layers are what spark3r takes them for, and measure time, memory and deviation of a "
        "schedule on a clip. The JSON file names no path, no host and no user. docs/evidence.md "
        "says how to send it in.",
        allow_abbrev=False,
    )
    add_model(command, default="reference")
    command.add_argument(
        "--clip",
        type=parse_text,
        default="rendered:7",
        metavar="CLIP",
        help="a video, a folder of images, or rendered:SEED (default: rendered:7)",
    )
    command.add_argument(
        "--frames",
        type=parse_count,
        default=FRAMES,
        metavar="N",
        help=f"number of frames, spread evenly (default: {FRAMES}, or all where there are fewer)",
    )
    command.add_argument(
        "--schedule",
        type=parse_text,
        default="token_stride:1:8",
        metavar="NAME",
        help="paper, uniform:QUERY:KEY_VALUE, token_stride:QUERY:KEY_VALUE, or a profile "
        "(default: token_stride:1:8)",
    )
    command.add_argument(
        "--device",
        type=parse_text,
        metavar="D",
        help="cpu, cuda, cuda:1 ... (default: cuda if there is one)",
    )
    add_dtype(command)
    command.add_argument(
        "--rounds",
        type=parse_count,
        default=3,
        metavar="N",
        help="samples of each latency (default: 3)",
    )
    command.add_argument("--output", type=parse_path, metavar="FILE", help="a new file to write")
    command.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    add_json(command)
    command.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from ..io.clips import check_source
    from .bench import refuse_output, write_output

    if options.output is not None:
        refuse_output(options.output, options.overwrite)
    check_source(options.clip, options.frames)

    from ..evidence import verify_model
    from ..loading.load import about, load_model
    from ..runner import Runner

    device = usable_device(options.device or default_device())
    known = about(options.model)
    if known.notice:
        _say(f"spark3r: {known.notice}")
    dtype = chosen_dtype(options, device)
    runner = Runner.of(load_model(options.model, device), dtype=dtype)
    clip = _clip(options, runner)
    found = verify_model(runner, clip, options.schedule, rounds=options.rounds, progress=_say)
    height, width = clip.images.shape[2:]
    record = {
        "format": FORMAT,
        "version": VERSION,
        "date": date.today().isoformat(),
        **_origins(options.model, runner),
        "device": _device_name(device),
        "dtype": options.dtype or str(dtype).removeprefix("torch."),
        "clip": {
            "kind": "footage" if is_real(options.clip) else options.clip,
            "frames": clip.frames,
            "height": height,
            "width": width,
        },
        **found.to_dict(),
        "environment": _environment(),
    }
    written = json.dumps(record, indent=2)
    if options.output is not None:
        write_output(options.output, written + "\n")
    if options.json:
        print(written)
    else:
        _print(record, found)
    return 0 if found.holds else 1


def _clip(options: argparse.Namespace, runner: Runner) -> Clip:
    from ..benchmark.api import REFERENCE_GRID
    from ..io.clips import load_clip

    patch_size = runner.family.metadata(runner.root).get("patch_size", 8)
    patches = REFERENCE_GRID[0] if runner.family.name == "reference" else RENDERED_PATCHES
    footage = load_clip(
        options.clip,
        runner.family,
        frames=options.frames,
        at_most=True,
        rendered_size=patches * patch_size,
    )
    return footage.clip


def _origins(model: str, runner: Runner) -> dict[str, Any]:
    """Return what is known of weights and code, without the path of a file on this machine."""
    from .provenance import provenance

    found = provenance((), runner, model, None, "")
    weights: dict[str, Any] = found["weights"]
    kind, separator, rest = model.partition(":")
    if weights["file"] is not None and not _is_public(rest):
        model = f"{kind}{separator}{weights['file']}"
    return {
        "model": {
            **weights,
            "name": model,
            "family": runner.family.name,
            "layers": runner.depth,
        },
        "code": found["code"],
    }


def _is_public(weights: str) -> bool:
    """Return True for a name on Hugging Face, and for none at all."""
    from ..loading.load import published_name

    return not weights or published_name(weights) is not None


def _device_name(device: str) -> str:
    from ..env import device_name

    return device_name(device)


def _environment() -> dict[str, Any]:
    from ..env import environment, kernels

    return {**environment(), "kernels": kernels()}


def _print(record: Mapping[str, Any], found: Evidence) -> None:
    """Print what was found, in words and a table."""
    from ..reconstruction import LABELS, in_unit

    model, clip = record["model"], record["clip"]
    print(
        f"{model['name']}: {model['layers']} global layers of family {model['family']}, "
        f"{record['dtype']} on {record['device']}\n"
        f"clip: {clip['frames']} frames of {clip['width']}x{clip['height']} pixels "
        f"({clip['kind']})\n"
    )
    words = {
        "ones": "factors of 1",
        "forced": "factors of 1 in spark3r's own code",
        "removed": "after removal",
    }
    for name, value in found.exactness.items():
        print(f"{words[name]}: " + (f"differs by {value:.2g}" if value else "the same bit for bit"))
    print(f"guard: {found.guard or 'every global layer is what spark3r takes it for'}\n")
    rows = [
        (
            name,
            f"{each['ms'] / 1000:.2f}",
            "-" if each["peak_mb"] is None else f"{each['peak_mb']:.0f}",
        )
        for name, each in found.passes.items()
    ]
    print_table(("pass", "seconds", "peak MB above model"), rows)
    for note in found.notes:
        print(f"note: {note}")
    if found.deviation is not None:
        texts = [
            f"{LABELS[name]} " + ("undefined" if value is None else in_unit(name, value))
            for name, value in found.deviation.items()
        ]
        print(f"\ndeviation of {found.schedule} from dense: {', '.join(texts)}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
