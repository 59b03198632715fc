"""Frames as they are read, which of them are wanted, and which cannot be had."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ClipError

if TYPE_CHECKING:
    from PIL.Image import Image

INSTALL = "pip install 'spark3r[video]'"


class Frame(NamedTuple):
    """One image of some footage.

    Attributes:
        name: File name, or number in a video.
        time: Seconds in a video; the number of the frame otherwise.
        image: The picture, upright.
    """

    name: str
    time: float
    image: Image


@dataclass
class Selection:
    """Which frames are wanted, and what became of those that cannot be read.

    Attributes:
        source: The footage as the user named it.
        frames: How many frames, None for all.
        at_most: Whether fewer will do where there are not so many.
        skip_bad: Whether to leave out what cannot be read.
        skipped: What was left out, with the reason.
    """

    source: str
    frames: int | None
    skip_bad: bool
    at_most: bool = False
    skipped: list[str] = field(default_factory=list)

    def pick(self, available: int) -> list[int]:
        """Return the numbers of the wanted frames among those available, in order.

        Raises:
            ClipError: There are fewer than asked for, unless fewer will do.
        """
        if self.frames is None or (self.at_most and available < self.frames):
            return list(range(available))
        if self.frames > available:
            raise ClipError(
                f"clip '{self.source}' has {available} frames, fewer than the {self.frames} asked "
                "for: ask for fewer, or give longer footage"
            )
        steps = self.frames - 1
        return [(2 * i * (available - 1) + steps) // (2 * steps) for i in range(self.frames)]

    def unreadable(self, what: str, why: object) -> None:
        """Note a frame that cannot be read.

        Raises:
            ClipError: Unless such frames are to be skipped.
        """
        if not self.skip_bad:
            raise ClipError(
                f"clip '{self.source}': {what} cannot be read ({why}); repair it, remove it, or "
                "skip what is unreadable with --skip-bad (skip_bad=True)"
            )
        self.skipped.append(f"{what}: {why}")
