"""Frames of footage: how one is read, which ones are selected, which are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ClipError
from ..transform import UPRIGHT

if TYPE_CHECKING:
    from PIL.Image import Image

INSTALL = "pip install 'spark3r[video]'"


class Frame(NamedTuple):
    """One image of some footage.

    Attributes:
        name: File name, or number in a video.
        time: Seconds from the beginning of a video whose frames all have a time; the number of
            the frame otherwise.
        image: The picture, upright.
        orientation: EXIF orientation in which it is stored, 1 to 8; 1 is upright.
    """

    name: str
    time: float
    image: Image
    orientation: int = UPRIGHT


@dataclass(frozen=True)
class Stretch:
    """The part of footage that frames are taken from.

    Attributes:
        start: First time: seconds in a video, the number of an image in a folder; default 0.
        end: Time that is no longer in it; None for the end of the footage.
        every: Take every so many frames of it, default 1.
    """

    start: float = 0.0
    end: float | None = None
    every: int = 1

    def numbers(self, times: Sequence[float]) -> list[int]:
        """Return the numbers of the frames in the stretch, given the time of every frame."""
        inside = [
            number
            for number, time in enumerate(times)
            if self.start <= time and (self.end is None or time < self.end)
        ]
        return inside[:: self.every]


WHOLE = Stretch()


@dataclass
class FrameSelection:
    """The choice of frames, and the record of those that cannot be read.

    Attributes:
        source: The footage as the user named it.
        frames: Number of frames, None for all.
        skip_bad: True leaves out frames that cannot be read, False raises an error.
        at_most: True takes all frames where there are fewer than ``frames``, False raises an error.
        skipped: Frames that were left out, each with the reason.
        passed_over: Files of a folder that look like images and are not read, each with the reason.
        stretch: The part of the footage that frames are taken from.
    """

    source: str
    frames: int | None
    skip_bad: bool
    at_most: bool = False
    skipped: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    stretch: Stretch = WHOLE

    def pick(self, times: Sequence[float]) -> list[int]:
        """Return the numbers of the selected frames, in order, spread evenly over the stretch.

        Args:
            times: Time of each frame of the footage; see `Stretch`.

        Raises:
            ClipError: If there are fewer than ``frames``, unless ``at_most``, or none at all in the
                stretch.
        """
        inside = self.stretch.numbers(times)
        where = "" if self.stretch == WHOLE else " in the stretch"
        if times and not inside:
            raise ClipError(
                f"clip '{self.source}' has no frame in the stretch: its frames are from "
                f"{times[0]:g} to {times[-1]:g}"
            )
        available = len(inside)
        if self.frames is None or (self.at_most and available < self.frames):
            return inside
        if self.frames > available:
            raise ClipError(
                f"clip '{self.source}' has {available} frames{where}, fewer than the "
                f"{self.frames} asked for: ask for fewer, or give longer footage"
            )
        steps = self.frames - 1
        return [
            inside[(2 * i * (available - 1) + steps) // (2 * steps)] for i in range(self.frames)
        ]

    def unreadable(self, what: str, why: object) -> None:
        """Record a frame that cannot be read.

        Raises:
            ClipError: Unless ``skip_bad``.
        """
        if not self.skip_bad:
            raise ClipError(
                f"clip '{self.source}': {what} cannot be read ({why}); repair it, remove it, or "
                "skip unreadable frames with --skip-bad (skip_bad=True)"
            )
        self.skipped.append(f"{what}: {why}")
