"""What ``spark3r run`` writes: the files of the reconstruction, and the page to look at it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .result import scene_facts

if TYPE_CHECKING:
    from torch import Tensor

    from ..io.clips import Footage
    from ..reconstruction import Reconstruction


def write_files(
    folder: Path,
    footage: Footage,
    made: Reconstruction,
    record: dict[str, Any],
    options: argparse.Namespace,
    mask: Tensor | None,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Write all files into an empty folder, and return the content of ``run.json``.

    Args:
        folder: The folder.
        footage: The footage.
        made: The reconstruction.
        record: Content of ``run.json`` so far.
        options: Options of the command.
        mask: ``[S, H, W]`` bool, False where a pixel makes no point; None takes all.
        say: Receives a line if the page cannot be written, without which the rest is whole.

    Raises:
        Spark3rError: If another file cannot be written.
    """
    from ..errors import Spark3rError
    from ..io.outputs import LEAST_CONFIDENT_PERCENT, MAX_POINTS, write_outputs
    from ..scene_page import write_scene

    percent = options.least_confident
    percent = LEAST_CONFIDENT_PERCENT if percent is None else percent
    written = write_outputs(
        folder,
        footage,
        made.run.prediction,
        record,
        max_points=options.max_points or MAX_POINTS,
        least_confident_percent=percent,
        mask=mask,
    )
    if not options.scene:
        return written
    try:
        write_scene(
            folder / "scene.html",
            footage.clip.images,
            footage.frames,
            made.run.prediction,
            title=f"{footage.clip.name}, {record['schedule']}",
            facts=scene_facts(record),
            dense=None if made.dense is None else made.dense.prediction,
            least_confident_percent=percent,
            mask=mask,
        )
    except (OSError, Spark3rError) as error:
        (folder / "scene.html").unlink(missing_ok=True)
        say(f"note: scene.html is not written: {error}")
    return written
