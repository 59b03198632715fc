"""Clips from footage: a folder of images, a video, or a rendered scene.

Pillow and PyAV are imported when footage is read, not before; the extra ``video`` installs them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..clips import Clip
from ..errors import ClipError, FamilyError
from ..families.base import Family, Preprocess
from ..families.parts.preprocessing import UnfitImageError
from ..families.registry import named_family
from ..transform import Transform
from .frames import WHOLE, Frame, FrameSelection, Stretch
from .images import image_files, read_folder
from .video import count_frames, read_video

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LEAST_FRAMES", "RENDERED_FRAMES", "Footage", "check_source", "clip_size", "load_clip"]

RENDERED = "rendered:"
"""Prefix of the name of a rendered scene; its seed follows."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

_SEED_DIGITS = 15  # the generator takes 64 bits, and frames count on from the seed

LEAST_FRAMES = 2
"""Least frames of a clip: one frame alone has no relative pose and no other frame to attend to."""

RENDERED_FRAMES = 24
"""Default number of frames of a rendered scene."""


@dataclass(frozen=True)
class Footage:
    """A clip, and the origin of its frames.

    Attributes:
        clip: The frames, as the model's preprocessing makes them.
        frames: Name of each frame: a file, or a video's frame number.
        times: Seconds of each frame from the beginning of a video, if all of its frames have a time
            and it ascends; the frame's number otherwise.
        transforms: Where the pixels of each original lie in the clip's frame.
        skipped: Frames that could not be read, each with the reason; empty unless ``skip_bad``.
        passed_over: Files of a folder that look like images and are not read, each with the reason.
    """

    clip: Clip
    frames: tuple[str, ...]
    times: tuple[float, ...]
    transforms: tuple[Transform, ...]
    skipped: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()


def load_clip(
    source: str,
    family: Family | str,
    *,
    frames: int | None = None,
    at_most: bool = False,
    skip_bad: bool = False,
    rendered_size: int = 64,
    stretch: Stretch = WHOLE,
) -> Footage:
    """Read footage as a model's own loader does.

    Args:
        source: A folder of images (in natural order of their names), a video, or
            ``rendered:SEED``, a scene of the reference model's renderer with ground truth.
        family: The family of the model that the clip is for, or its name, such as ``vggt``. Its
            preprocessing makes the clip, except for a rendered scene.
        frames: Number of frames, spread evenly from the first to the last; None takes all, and
            `RENDERED_FRAMES` of a rendered scene.
        at_most: True takes all frames where there are fewer than ``frames``, instead of raising.
        skip_bad: True leaves out frames that cannot be read, instead of raising; the clip may then
            be shorter than ``frames``.
        rendered_size: Height and width of a rendered scene in pixels, a multiple of the model's
            patch size; default 64.
        stretch: The part of the footage that frames are taken from, by default all of it.

    Raises:
        ClipError: If there is no such footage, it cannot be read, has fewer frames than asked for
            or than `LEAST_FRAMES`, an image is too small for the model, or Pillow or PyAV is
            missing.
        FamilyError: If there is no such family, or it has no preprocessing.
    """
    check_source(source, frames, stretch)
    if source.startswith(RENDERED):
        return _rendered(source, frames or RENDERED_FRAMES, rendered_size)
    preprocess = _preprocess_of(family)
    path = footage_path(source)
    selection = FrameSelection(source, frames, skip_bad, at_most, stretch=stretch)
    reading = read_folder(path, selection) if path.is_dir() else read_video(path, selection)
    return _preprocessed(path, reading, preprocess, selection)


def clip_size(
    source: str,
    family: Family | str,
    *,
    frames: int | None = None,
    at_most: bool = False,
    skip_bad: bool = False,
    rendered_size: int = 64,
    stretch: Stretch = WHOLE,
) -> tuple[int, tuple[int, int]]:
    """Return length, height and width of the clip that `load_clip` makes, without making it.

    A folder's or a video's first readable frame stands for the size of all. Where images differ in
    size, and where some cannot be read, the clip may be smaller.

    Raises:
        ClipError: As `load_clip` does, except for what is wrong with later frames.
        FamilyError: As `load_clip` does.
    """
    check_source(source, frames, stretch)
    if source.startswith(RENDERED):
        return frames or RENDERED_FRAMES, (rendered_size, rendered_size)
    preprocess, path = _preprocess_of(family), footage_path(source)
    selection = FrameSelection(source, frames, skip_bad, at_most, stretch=stretch)
    if path.is_dir():
        count = len(selection.pick(range(len(image_files(path, selection)))))
    else:
        count = count_frames(path, selection)
    few = FrameSelection(source, None, True)
    first = next(read_folder(path, few) if path.is_dir() else read_video(path, few), None)
    if first is None:
        raise ClipError(_too_few(few, 0))
    try:
        height, width = preprocess([first.image]).images.shape[2:]
    except UnfitImageError as error:
        raise ClipError(f"clip '{source}', {first.name}: {error}") from error
    return count, (height, width)


def _preprocess_of(family: Family | str) -> Preprocess:
    known = named_family(family) if isinstance(family, str) else family
    if known.preprocess is None:
        raise FamilyError(
            f"family '{known.name}' does not say how images become its model's input: give its "
            "Family a preprocess=, or make a spark3r.Clip of images [S, 3, H, W] in [0, 1]"
        )
    return known.preprocess


def check_source(source: str, frames: int | None = None, stretch: Stretch = WHOLE) -> None:
    """Check a source before a model is loaded for it.

    Raises:
        ClipError: If there is no such file or folder, the seed is not a number, ``frames`` is less
            than `LEAST_FRAMES`, the stretch is empty, or there is one of a rendered scene.
    """
    if stretch.end is not None and stretch.end <= stretch.start:
        raise ClipError(
            f"clip '{source}': the stretch from {stretch.start:g} to {stretch.end:g} is empty"
        )
    if source.startswith(RENDERED) and stretch != WHOLE:
        raise ClipError(f"clip '{source}': a rendered scene has no stretches, give frames alone")
    if frames is not None and frames < LEAST_FRAMES:
        raise ClipError(
            f"clip '{source}': asked for {frames} frame{'s' * (frames != 1)}, expected at least "
            f"{LEAST_FRAMES}, as one frame alone has nothing to attend to"
        )
    if source.startswith(RENDERED):
        seed = source.removeprefix(RENDERED)
        if not seed.isascii() or not seed.isdigit() or len(seed) > _SEED_DIGITS:
            raise ClipError(
                f"clip '{source}', expected rendered:SEED such as rendered:7, with at most "
                f"{_SEED_DIGITS} digits"
            )
        return
    path = footage_path(source)
    if _URL.match(source):
        raise ClipError(
            f"clip '{source}' is an address, and nothing is downloaded: save the video, or its "
            "frames as a folder of images, and name that"
        )
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # a name that no file can have, or a folder not to enter
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ClipError(f"clip '{source}' cannot be opened ({reason})") from error
    if not exists:
        raise ClipError(
            f"clip '{source}': there is no such file or folder; expected a folder of images, a "
            "video or rendered:SEED"
        )
    if not (path.is_dir() or path.is_file()):
        raise ClipError(f"clip '{source}' is neither a file nor a folder")


def footage_path(source: str) -> Path:
    """Return the path of a folder or a video as the user named it."""
    try:
        return Path(source).expanduser()
    except RuntimeError:  # no user of that name has a home
        return Path(source)


def rendered_seed(source: str) -> int | None:
    """Return the seed of a rendered scene that `check_source` accepts; None for real footage."""
    return int(source.removeprefix(RENDERED)) if source.startswith(RENDERED) else None


def _preprocessed(
    path: Path, reading: Iterator[Frame], preprocess: Preprocess, selection: FrameSelection
) -> Footage:
    names: list[str] = []
    times: list[float] = []
    orientations: list[int] = []

    def images() -> Iterator[Image]:
        for frame in reading:
            names.append(frame.name)
            times.append(frame.time)
            orientations.append(frame.orientation)
            yield frame.image
        if len(names) < LEAST_FRAMES:
            raise ClipError(_too_few(selection, len(names)))

    try:
        made = preprocess(images())
    except UnfitImageError as error:
        raise ClipError(f"clip '{selection.source}', {names[-1]}: {error}") from error
    turned = zip(made.transforms, orientations, strict=True)
    return Footage(
        Clip(_name(path), made.images),
        tuple(names),
        tuple(times),
        tuple(transform.stored(orientation) for transform, orientation in turned),
        tuple(selection.skipped),
        tuple(selection.passed_over),
    )


def _too_few(selection: FrameSelection, read: int) -> str:
    skipped = selection.skipped
    left = f" is left after {len(skipped)} that cannot be read" if skipped else " is there"
    return (
        f"clip '{selection.source}': {read or 'no'} frame{left}, expected at least "
        f"{LEAST_FRAMES}" + (f" ({skipped[0]})" if skipped else "")
    )


def _name(path: Path) -> str:
    """Return a file's name, or a folder's with its parent's, as many are called ``images``."""
    path = path.absolute()
    return "/".join(path.parts[-2:]) if path.is_dir() and len(path.parts) > 2 else path.name


def _rendered(source: str, frames: int, size: int) -> Footage:
    from ..reference.scenes.render import rendered_clip

    clip = rendered_clip(int(source.removeprefix(RENDERED)), frames, size, size)
    return Footage(
        clip,
        tuple(f"frame {number}" for number in range(frames)),
        tuple(map(float, range(frames))),
        (Transform((size, size)),) * frames,
    )
