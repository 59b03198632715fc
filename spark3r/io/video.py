"""Videos: which frames are whole, which are selected, and what is damaged."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ClipError
from .frames import INSTALL, Frame, FrameSelection
from .images import SUFFIXES, turned_upright

if TYPE_CHECKING:
    from PIL.Image import Image


def read_video(path: Path, selection: FrameSelection) -> Iterator[Frame]:
    """Yield the selected frames of a video, turned as its metadata says.

    The video is decoded twice. The first pass finds which frames are whole, as neither the number
    of frames nor the duration that a file states can be relied on.

    Raises:
        ClipError: If the file is not a video, has too few frames, or is damaged.
    """
    _require(path, selection.source)
    survey = _known_survey(path, selection.source)
    for what, why in survey.damage:
        selection.unreadable(what, why)
    wanted = {survey.whole[each]: survey.times[each] for each in selection.pick(survey.times)}
    # Around damage, the frames that threads make depend on their number and on chance.
    threads = not survey.damage
    for number, image, orientation in _decoded(path, selection.source, wanted, threads):
        yield Frame(f"frame {number}", wanted[number], image, orientation)


def read_numbers(path: Path, source: str, numbers: Collection[int]) -> Iterator[Image]:
    """Yield the frames of a video that have these numbers, turned upright, in ascending order.

    Numbers are those in the names of frames that `read_video` yields. The video is decoded once.

    Raises:
        ClipError: If the file is not a video, or PyAV is missing.
    """
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ClipError(f"videos are read with PyAV, which is missing: {INSTALL}") from error
    for _, image, _ in _decoded(path, source, frozenset(numbers), threads=False):
        yield image


def _decoded(
    path: Path, source: str, wanted: Collection[int], threads: bool
) -> Iterator[tuple[int, Image, int]]:
    """Yield number, upright image and EXIF orientation of the wanted frames."""
    from .decoding import ToImages, open_video, orientation_of

    to_image = ToImages()
    number = 0
    with open_video(path, source, threads=threads) as video:
        for frame, _ in video.decode():
            if number in wanted and frame is not None:
                try:
                    orientation = orientation_of(frame)
                except ValueError as error:
                    raise ClipError(f"clip '{source}': {error}") from error
                yield number, turned_upright(to_image(frame), orientation), orientation
            number += frame is not None


def _require(path: Path, source: str) -> None:
    """Raise an error for an image, or where a library is missing."""
    if path.suffix.lower() in SUFFIXES:
        raise ClipError(
            f"clip '{source}' is one image, and one frame alone has nothing to attend "
            "to: give the folder of images, or a video"
        )
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ClipError(
            f"clip '{source}': videos are read with PyAV, which is missing: {INSTALL}; "
            "or give a folder of images"
        ) from error
    try:
        from PIL import Image  # noqa: F401
    except ImportError as error:
        raise ClipError(f"frames are made with Pillow, which is missing: {INSTALL}") from error


@dataclass(frozen=True)
class _Survey:
    """What a video holds.

    Attributes:
        whole: Number of every whole frame, among all that are decoded.
        times: Time of each of them: seconds from the beginning of the video if they all have one
            and it ascends, and their numbers otherwise.
        damage: Every damaged part, and what is wrong with it.
    """

    whole: tuple[int, ...]
    times: tuple[float, ...]
    damage: tuple[tuple[str, str], ...]


def count_frames(path: Path, selection: FrameSelection) -> int:
    """Return how many frames `read_video` will yield.

    Raises:
        ClipError: As `read_video` does.
    """
    _require(path, selection.source)
    survey = _known_survey(path, selection.source)
    for what, why in survey.damage:
        selection.unreadable(what, why)
    return len(selection.pick(survey.times))


def _known_survey(path: Path, source: str) -> _Survey:
    """Return the survey of a video. That of the last one is known, until the file changes."""
    status = path.stat()
    return _cached_survey(path, source, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _cached_survey(path: Path, source: str, size: int, modified: int) -> _Survey:
    return _survey(path, source)


def _survey(path: Path, source: str) -> _Survey:
    """Decode a video to find its whole frames, in one thread, as several miss damage.

    A frame after damage is drawn from it, up to the next key frame: the decoder does not say so.
    """
    from .decoding import open_video

    whole: list[int] = []
    times: list[float | None] = []
    damage: list[tuple[str, str]] = []
    number = 0
    lost, first, why = 0, 0, ""  # of the damaged part that is being read, if lost > 0
    with open_video(path, source, threads=False) as video:
        for frame, wrong in video.decode():
            if wrong is not None and not lost:
                first, why = number, wrong
            elif lost and wrong is None and frame.key_frame:
                damage.append((f"{lost} frame{'s' * (lost != 1)} from frame {first} on", why))
                lost = 0
            if lost or wrong is not None:
                lost += 1
            else:
                whole.append(number)
                times.append(frame.time)
            number += frame is not None
        if lost:
            damage.append((f"the part from frame {first} on", why))
        missing = video.missing_seconds()
        if missing:
            end = f"the last {missing:.2f} s of {video.duration:.2f} s"
            damage.append((end, "the file ends early"))
    seconds = _times(whole, times, video.start)
    return _Survey(tuple(whole), seconds, tuple(damage))


def _times(numbers: list[int], seconds: list[float | None], start: float) -> tuple[float, ...]:
    known = [each - start for each in seconds if each is not None]
    ascending = all(early < late for early, late in pairwise(known))
    if len(known) == len(numbers) and ascending:
        return tuple(known)
    return tuple(map(float, numbers))
