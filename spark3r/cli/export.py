"""``spark3r export``: a reconstruction in the formats of other programs."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from ..errors import printable
from .arguments import add_json, parse_path, parse_text

if TYPE_CHECKING:
    from ..io.exports.export import Export
    from ..io.exports.refinement import Refinement

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

FORMATS = ("colmap", "nerfstudio", "glb")
"""Names of the formats; `spark3r.io.exports.FORMATS`, without its imports."""

FOLDER = "export"
"""Name of the folder of exports inside the folder of a reconstruction."""

EXAMPLES = """examples:
  spark3r export out --to colmap
  spark3r export out --to colmap,nerfstudio,glb --refine --output tour
"""


def add_export(commands: Subparsers) -> None:
    """Declare ``spark3r export``."""
    command = commands.add_parser(
        "export",
        help="write a reconstruction for COLMAP, nerfstudio or a viewer of GLB files",
        description="Write a folder of spark3r run in the formats of other programs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument(
        "folder", type=parse_path, metavar="DIR", help="a folder that spark3r run wrote"
    )
    command.add_argument(
        "--to",
        required=True,
        type=parse_formats,
        metavar="FORMATS",
        help=f"some of {','.join(FORMATS)}, with commas between them",
    )
    command.add_argument(
        "--output",
        type=parse_path,
        metavar="FOLDER",
        help=f"a folder that does not exist yet (default: DIR/{FOLDER})",
    )
    command.add_argument(
        "--clip",
        type=parse_text,
        metavar="CLIP",
        help="where the footage is now (default: where it was)",
    )
    command.add_argument(
        "--refine",
        action="store_true",
        help="refine the cameras by a bundle adjustment with pycolmap, unless matches that are "
        "held out agree less",
    )
    add_json(command)
    command.set_defaults(run=_export)


def parse_formats(text: str) -> tuple[str, ...]:
    """Return the formats that a text names."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in FORMATS:
            raise argparse.ArgumentTypeError(f"'{name}', expected some of {','.join(FORMATS)}")
    return names


def _export(options: argparse.Namespace) -> int:
    from ..io.exports import export_output
    from ..io.exports.matching import load_pycolmap
    from ..io.outputs import new_folder, refuse_folder
    from ..io.reading import read_output

    output = read_output(options.folder)
    target = options.output or options.folder / FOLDER
    refuse_folder(target)
    if options.refine:
        load_pycolmap()
    with new_folder(target) as folder:
        made = export_output(
            output, folder, options.to, source=options.clip, refined=options.refine, say=_say
        )
    if options.json:
        print(json.dumps(export_record(made), indent=2))
        return 0
    print(f"written    {printable(str(target))}: {', '.join(options.to)}")
    if made.reprojection_px is not None:
        print(
            f"points     {made.points}, {made.observations} observations, "
            f"{made.reprojection_px:.2f} px mean reprojection error"
        )
    if made.refinement is not None:
        _print_refinement(made.refinement)
    return 0


def _say(message: str) -> None:
    print(f"spark3r: {message}", file=sys.stderr)


def _print_refinement(made: Refinement) -> None:
    (before, after), (used_before, used_after) = made.held_out_px, made.used_px
    kept = "kept" if made.rolled_back is None else f"rolled back: {made.rolled_back}"
    print(f"refined    {kept}")
    print(f"held out   {before:.2f} -> {after:.2f} px mean error, {made.held_out_tracks} tracks")
    print(f"adjusted   {used_before:.2f} -> {used_after:.2f} px median error")
    print(
        f"moved      cameras {made.moved:.3g} and {made.turned_deg:.2f}°, focal lengths "
        f"{100 * made.focal:.2f}% (medians)"
    )
    print(f"tracks     {made.track_length:g} frames long (median)")


def export_record(made: Export) -> dict[str, Any]:
    """Return what an export holds as JSON."""
    record: dict[str, Any] = {
        "points": made.points,
        "observations": made.observations,
        "reprojection_px": made.reprojection_px,
        "refinement": None,
    }
    if made.refinement is not None:
        refinement = made.refinement
        record["refinement"] = {
            "rolled_back": refinement.rolled_back,
            "held_out_tracks": refinement.held_out_tracks,
            "held_out_px": list(refinement.held_out_px),
            "used_px": list(refinement.used_px),
            "moved": refinement.moved,
            "turned_deg": refinement.turned_deg,
            "focal": refinement.focal,
            "track_length": refinement.track_length,
        }
    return record
