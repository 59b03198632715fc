"""Roles of clips: search, validation, and held out for the report."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from spark3r.clips import Clip
from spark3r.errors import ClipError

from .defaults import FAR_TARGET, FEW_TO_VALIDATE, LEAST_FRAMES, MOST_HELD_OUT


@dataclass(frozen=True)
class Split:
    """Clips by role. No frame has two roles.

    Attributes:
        search: Clips that sensitivities are measured and trials judged on.
        validation: Clips that decide which schedule is exported.
        held_out: Clips that the reported figures are from.
        skipped: Frames that could not be read, with the reason.
    """

    search: tuple[Clip, ...]
    validation: tuple[Clip, ...]
    held_out: tuple[Clip, ...]
    skipped: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Number of clips by role, in one line."""
        roles = (
            ("search", self.search),
            ("validation", self.validation),
            ("held out", self.held_out),
        )
        counts = ", ".join(f"{role} {len(clips)}" for role, clips in roles)
        return f"{self.lengths}: {counts}"

    @property
    def lengths(self) -> str:
        """Length of the clips, in words."""
        frames = {clip.frames for clip in self.clips}
        shortest_and_longest = sorted({min(frames), max(frames)})
        return f"clips of {' to '.join(map(str, shortest_and_longest))} frames"

    @property
    def clips(self) -> tuple[Clip, ...]:
        """All clips."""
        return (*self.search, *self.validation, *self.held_out)

    def doubts(self, target_frames: int) -> list[str]:
        """Return warnings about too few or too short clips, a line each.

        Args:
            target_frames: Length in frames that the budget is for.
        """
        found = []
        if 0 < len(self.validation) < FEW_TO_VALIDATE:
            found.append(
                f"{len(self.validation)} validation clip(s) can hardly tell schedules apart, so "
                "that the simplest one is likely to be selected: give more footage, or shorter "
                "clips by --frames"
            )
        if target_frames > FAR_TARGET * self.shortest:
            found.append(
                f"clips of {self.shortest} frames stand in for {target_frames} frames. A schedule "
                "that is chosen on longer clips (--frames) is more faithful there, and takes "
                "longer to find"
            )
        return found

    @property
    def shortest(self) -> int:
        """Frames of the shortest clip."""
        return min(clip.frames for clip in self.clips)


def split_clips(
    clips: Sequence[Clip],
    held_out: Sequence[Clip] = (),
    frames: int | None = None,
    skipped: tuple[str, ...] = (),
) -> Split:
    """Give clips their roles: half are for the search, a quarter each for validation and held out.

    Clips that are longer than ``frames`` are cut into consecutive stretches. Fewer clips than four
    (three with ``held_out``) are always cut and serve all roles: the first half of each clip is for
    the search, and so on.

    Args:
        clips: Clips with different names.
        held_out: Clips for the report only; empty holds out some of ``clips``.
        frames: Frames of a stretch; None cuts only if there are too few clips, into as few
            stretches as there are roles.
        skipped: Frames that could not be read, with the reason.

    Raises:
        ClipError: If there is no clip, if names repeat, if a clip is too short, or if more than
            `MOST_HELD_OUT` clips would be held out.
    """
    names = [clip.name for clip in (*clips, *held_out)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if not clips or repeated:
        raise ClipError(
            f"expected clips with different names, got {', '.join(repeated) or 'none'} twice"
            if repeated
            else "there is no clip to calibrate on"
        )
    roles = 3 if held_out else 4
    dealt: list[list[Clip]] = [[] for _ in range(roles)]
    if len(clips) >= roles:
        for number, clip in enumerate(clips):
            count = clip.frames // frames if frames else 1
            dealt[number % roles] += _stretches(clip, count) if count > 1 else [clip]
    else:
        for clip in clips:
            count = max(roles, clip.frames // frames if frames else 0)
            for number, part in enumerate(_stretches(clip, count)):
                dealt[number * roles // count].append(part)
    reported = tuple(held_out) or tuple(dealt[3])
    if len(reported) > MOST_HELD_OUT:
        raise ClipError(
            f"{len(reported)} clips would be held out, and a profile has room for the figures of "
            f"{MOST_HELD_OUT}: give fewer clips, or longer ones (--frames)"
        )
    for clip in (*itertools.chain(*dealt), *reported):
        if clip.frames < LEAST_FRAMES:
            raise ClipError(
                f"clip '{clip.name}' has {clip.frames} frame(s), expected at least {LEAST_FRAMES}: "
                "a single frame has no pose to judge"
            )
    return Split((*dealt[0], *dealt[1]), tuple(dealt[2]), reported, skipped)


def _stretches(clip: Clip, count: int) -> list[Clip]:
    if clip.frames < count * LEAST_FRAMES:
        raise ClipError(
            f"clip '{clip.name}' has {clip.frames} frames, expected at least "
            f"{count * LEAST_FRAMES} to cut it into {count} stretches; give more clips"
        )
    bounds = [clip.frames * part // count for part in range(count + 1)]
    parts = []
    for begin, end in itertools.pairwise(bounds):
        part = clip.select(slice(begin, end))
        parts.append(
            Clip(
                f"{clip.name}[{begin}:{end}]",
                part.images,
                part.intrinsics,
                part.depth,
                part.extrinsics,
            )
        )
    return parts
