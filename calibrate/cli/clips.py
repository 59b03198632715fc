"""Clips by role, read from the footage that ``--clip`` and ``--held-out`` name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from spark3r.clips import Clip
from spark3r.families.base import Family
from spark3r.io.clips import RENDERED, Footage, load_clip
from spark3r.reference.scenes.seeds import CALIBRATION, EVALUATION

from ..clips import Split, split_clips
from ..defaults import EFFORTS, FROM_HELD_OUT_CLIPS, STRETCHES, Effort
from ..progress import Reporter
from ..side_by_side import side_by_side, threads
from .rendered import stored_clip

Read = Callable[[str, int], Footage]
"""Function(name, frames) that reads the first frames of footage, or all if it has fewer."""


def clips_by_role(
    sources: Sequence[str],
    held_out: Sequence[str],
    frames: int,
    read: Read,
    reporter: Reporter,
    effort: Effort,
    *,
    searches: bool,
) -> Split:
    """Return the clips of a calibration by role: footage, or rendered scenes where there is none.

    Args:
        sources: Footage to calibrate on.
        held_out: Footage for the report only.
        frames: Frames of each clip.
        read: Function that reads footage.
        reporter: Receives the progress.
        effort: It says how many clips there are.
        searches: Whether anything is searched; if not, only held-out scenes are rendered.
    """
    if not sources and not held_out:
        return rendered_split(frames, read, reporter, effort, held_out_only=not searches)
    sources = sources or default_sources(effort)
    stretches = EFFORTS[effort].stretches
    return read_split(sources, held_out, frames, read, reporter, stretches)


def rendered_split(
    frames: int,
    read: Read,
    reporter: Reporter,
    effort: Effort = "normal",
    *,
    held_out_only: bool = False,
) -> Split:
    """Return the default: rendered scenes, the held-out ones from seeds of their own."""
    search, validation, held_out = EFFORTS[effort][:3]
    if held_out_only:
        search, validation, held_out = 0, 0, FROM_HELD_OUT_CLIPS
    seeds = (*CALIBRATION[: search + validation], *EVALUATION[:held_out])
    clips = side_by_side(
        lambda seed: read(f"{RENDERED}{seed}", frames).clip,
        seeds,
        threads(),
        reporter.step("rendering"),
    )
    searched = search + validation
    return Split(tuple(clips[:search]), tuple(clips[search:searched]), tuple(clips[searched:]))


def default_sources(effort: Effort) -> list[str]:
    """Return the rendered scenes for search and validation if only held-out footage is given."""
    count = EFFORTS[effort].search_clips + EFFORTS[effort].validation_clips
    return [f"{RENDERED}{seed}" for seed in CALIBRATION[:count]]


def read_split(
    sources: Sequence[str],
    held_out: Sequence[str],
    frames: int,
    read: Read,
    reporter: Reporter,
    stretches: int = STRETCHES,
) -> Split:
    """Return footage by role.

    Args:
        sources: Folders of images, videos, or ``rendered:SEED``.
        held_out: Footage for the reported figures; empty holds out some of ``sources``.
        frames: Frames of each clip.
        read: Function that reads footage.
        reporter: Receives the progress, and which frames were skipped.
        stretches: Number of clips that ``sources`` are cut into if they are fewer. They are read at
            a greater length for that. Default `STRETCHES`.

    Raises:
        ClipError: If footage cannot be read, or is too short to be cut.
    """
    roles = 3 if held_out else 4
    longest = max(math.ceil(stretches / len(sources)), roles if len(sources) < roles else 1)
    total = len(sources) + len(held_out)
    clips: list[Clip] = []
    skipped: list[str] = []
    for number, source in enumerate((*sources, *held_out)):
        reporter.progress("reading", number, total)
        longer = longest if number < len(sources) else 1
        footage = read(source, longer * frames)
        if footage.skipped:
            reporter.say(
                f"clip '{source}': {len(footage.skipped)} unreadable and skipped "
                f"({'; '.join(footage.skipped[:3])}{'; ...' * (len(footage.skipped) > 3)})"
            )
        if footage.passed_over:
            reporter.say(
                f"clip '{source}': {len(footage.passed_over)} that look like images were passed "
                f"over ({'; '.join(footage.passed_over[:3])}"
                f"{'; ...' * (len(footage.passed_over) > 3)})"
            )
        skipped += footage.skipped
        clips.append(footage.clip)
    reporter.progress("reading", total, total)
    split = split_clips(clips[: len(sources)], clips[len(sources) :], frames, tuple(skipped))
    reporter.say(split.text)
    return split


def reader(family: Family, size: int, skip_bad: bool, cache: Path | None = None) -> Read:
    """Return the function that reads footage for a family, and renders scenes of a size.

    Rendered clips are kept in the folder ``cache``, if there is one.
    """

    def read(source: str, frames: int) -> Footage:
        def load() -> Footage:
            return load_clip(
                source,
                family,
                frames=frames,
                at_most=True,
                skip_bad=skip_bad,
                rendered_size=size,
            )

        if cache is None or not source.startswith(RENDERED):
            return load()
        name = f"{source.removeprefix(RENDERED)}-{frames}-{size}"
        return Footage(stored_clip(cache, name, lambda: load().clip), (), (), ())

    return read
