"""Footage as a clip: a folder of images, a video, or a rendered scene.

Pillow and PyAV are imported when footage is read, not before: they are the extra ``video``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..clips import Clip
from ..errors import ClipError
from ..families.parts.preprocessing import Preprocess, UnfitImageError
from .frames import Frame, Selection
from .images import read_folder
from .video import read_video

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LEAST_FRAMES", "RENDERED_FRAMES", "Footage", "check_source", "load_clip"]

RENDERED = "rendered:"
"""What the name of a rendered scene begins with; its seed follows."""

LEAST_FRAMES = 2
"""Frames of a clip: with one there is no pose, and no other frame to attend to."""

RENDERED_FRAMES = 24
"""Frames of a rendered scene unless told otherwise."""


@dataclass(frozen=True)
class Footage:
    """A clip, and where its frames come from.

    Attributes:
        clip: The frames, as the model's preprocessing makes them.
        frames: Name of each: a file, or a video's frame number.
        times: Seconds of each frame in a video; the frame's number otherwise.
        skipped: What could not be read, each with the reason; empty unless ``skip_bad``.
    """

    clip: Clip
    frames: tuple[str, ...]
    times: tuple[float, ...]
    skipped: tuple[str, ...] = ()


def load_clip(
    source: str,
    preprocess: Preprocess,
    *,
    frames: int | None = None,
    at_most: bool = False,
    skip_bad: bool = False,
    rendered_size: int = 64,
) -> Footage:
    """Read footage.

    Args:
        source: A folder of images (in natural order of their names), a video, or
            ``rendered:SEED``, a scene of the reference model's renderer with ground truth.
        preprocess: From Pillow images to ``[S, 3, H, W]``; a family's ``preprocess``. Rendered
            scenes do without.
        frames: Take so many, spread evenly from the first to the last; None takes all (and
            `RENDERED_FRAMES` of a rendered scene).
        at_most: Take all where there are fewer than ``frames``, instead of raising.
        skip_bad: Leave out frames that cannot be read instead of raising; the clip may then be
            shorter than ``frames``.
        rendered_size: Height and width of a rendered scene in pixels, a multiple of the model's
            patch size.

    Returns:
        The clip with its frames' names and times, and what was skipped.

    Raises:
        ClipError: There is no such footage, it cannot be read, has fewer frames than asked for or
            than `LEAST_FRAMES`, an image is too small for the model, or Pillow or PyAV is missing.
    """
    check_source(source, frames)
    if source.startswith(RENDERED):
        return _rendered(source, frames or RENDERED_FRAMES, rendered_size)
    path = Path(source).expanduser()
    selection = Selection(source, frames, skip_bad, at_most)
    return _preprocessed(
        path,
        read_folder(path, selection) if path.is_dir() else read_video(path, selection),
        preprocess,
        selection,
    )


def check_source(source: str, frames: int | None = None) -> None:
    """Refuse at once, before a model is loaded, what cannot be footage.

    Raises:
        ClipError: There is no such file or folder, the seed is no number, or too few frames are
            asked for.
    """
    if frames is not None and frames < LEAST_FRAMES:
        raise ClipError(
            f"clip '{source}': asked for {frames} frame{'s' * (frames != 1)}, expected at least "
            f"{LEAST_FRAMES}, as one frame alone has nothing to attend to"
        )
    if source.startswith(RENDERED):
        seed = source.removeprefix(RENDERED)
        if not seed.isascii() or not seed.isdigit():
            raise ClipError(f"clip '{source}', expected rendered:SEED such as rendered:7")
        return
    path = Path(source).expanduser()
    if not path.exists():
        raise ClipError(
            f"clip '{source}': there is no such file or folder; expected a folder of images, a "
            "video or rendered:SEED"
        )
    if not (path.is_dir() or path.is_file()):
        raise ClipError(f"clip '{source}' is neither a file nor a folder")


def _preprocessed(
    path: Path, reading: Iterator[Frame], preprocess: Preprocess, selection: Selection
) -> Footage:
    names: list[str] = []
    times: list[float] = []

    def images() -> Iterator[Image]:
        for frame in reading:
            names.append(frame.name)
            times.append(frame.time)
            yield frame.image
        if len(names) < LEAST_FRAMES:
            raise ClipError(_too_few(selection, len(names)))

    try:
        tensor = preprocess(images())
    except UnfitImageError as error:
        raise ClipError(f"clip '{selection.source}', {names[-1]}: {error}") from error
    return Footage(Clip(_name(path), tensor), tuple(names), tuple(times), tuple(selection.skipped))


def _too_few(selection: Selection, read: int) -> str:
    skipped = selection.skipped
    left = f" is left after {len(skipped)} that cannot be read" if skipped else " is there"
    return (
        f"clip '{selection.source}': {read or 'no'} frame{left}, expected at least "
        f"{LEAST_FRAMES}" + (f" ({skipped[0]})" if skipped else "")
    )


def _name(path: Path) -> str:
    """Return a file's name, or a folder's with its parent's: many are called ``images``."""
    path = path.absolute()
    return "/".join(path.parts[-2:]) if path.is_dir() and len(path.parts) > 2 else path.name


def _rendered(source: str, frames: int, size: int) -> Footage:
    from ..reference.scenes.render import rendered_clip

    clip = rendered_clip(int(source.removeprefix(RENDERED)), frames, size, size)
    numbers = range(frames)
    return Footage(clip, tuple(f"frame {i}" for i in numbers), tuple(map(float, numbers)))
