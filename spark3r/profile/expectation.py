"""The deviation that a profile measured, to compare a run on other footage with."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .document import Profile
from .evidence import Measurement, Role

ROLES: tuple[Role, ...] = ("held_out", "validation", "search")
"""Roles of clips, the one that says most about other footage first."""

FIGURES: Mapping[str, str] = {
    "depth": "depth_log",
    "rotation_deg": "rotation_deg",
    "translation_deg": "translation_deg",
    "points": "points",
    "scale_drift": "scale_drift",
}
"""Names of a run's deviations, and of the same figures in a profile."""

BEYOND = 1.5
"""A deviation this many times the largest of the evidence is beyond it.

Of the shipped profile's figures on 12 further rendered scenes, the highest was 1.3 times the
largest of its 16 clips. On a handheld video of a kitchen it was 12 times as large.
"""


@dataclass(frozen=True)
class ExpectedFigure:
    """One deviation over the clips of the evidence.

    Attributes:
        mean: Mean over the clips.
        largest: Largest of the clips.
    """

    mean: float
    largest: float

    def is_exceeded(self, value: float) -> bool:
        """Return True for a deviation that is beyond the evidence."""
        return value > BEYOND * self.largest


@dataclass(frozen=True)
class Expectation:
    """What a profile measured of the deviation of one of its schedules.

    Attributes:
        clips: Names of the clips.
        frames: Largest length of these clips.
        role: Use of these clips, of those that the figures are known on: see `ROLES`.
        figures: Deviations by the names of `FIGURES`.
    """

    clips: tuple[str, ...]
    frames: int
    role: Role
    figures: Mapping[str, ExpectedFigure]

    def to_dict(self) -> dict[str, Any]:
        """Return the expectation as JSON values."""
        return {"on": str(self)} | asdict(self)

    def __str__(self) -> str:
        rendered = all(name.startswith("rendered:") for name in self.clips)
        kind = "rendered clip" if rendered else "clip"
        number = len(self.clips)
        return f"{number} {kind}{'s' * (number != 1)} of {self.frames} frames"


def expected_deviation(
    profile: Profile,
    schedule: str | None = None,
    *,
    grid: tuple[int, int] | None = None,
    dtype: str | None = None,
) -> Expectation | None:
    """Return the deviation that a profile measured of a schedule, None if it measured none.

    Args:
        profile: The profile.
        schedule: Name of one of its schedules; None takes its default.
        grid: Rows and columns of patches of the run. A measurement on this grid is preferred.
        dtype: Precision of the run, such as ``bfloat16``. One in it is preferred after that.
    """
    name = schedule or profile.default
    found = [(each, _expectation(each, name)) for each in profile.measurements]
    known = [(each, expected) for each, expected in found if expected is not None]
    if not known:
        return None
    return max(known, key=lambda pair: (pair[0].grid == grid, pair[0].dtype == dtype))[1]


def _expectation(measurement: Measurement, schedule: str) -> Expectation | None:
    known = {clip.name: clip for clip in measurement.clips}
    deviations = {
        figures.clip: figures.deviation
        for run in measurement.schedules
        if run.schedule == schedule
        for figures in run.figures
        if figures.deviation is not None
    }
    for role in ROLES:
        clips = tuple(clip for clip in deviations if known[clip].role == role)
        if not clips:
            continue
        values = {
            ours: [deviations[clip][theirs] for clip in clips if theirs in deviations[clip]]
            for ours, theirs in FIGURES.items()
        }
        return Expectation(
            clips,
            max(known[clip].frames for clip in clips),
            role,
            {
                name: ExpectedFigure(statistics.fmean(taken), max(taken))
                for name, taken in values.items()
                if taken
            },
        )
    return None
