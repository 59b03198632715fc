"""The result of a calibration: a profile and everything it was made of."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from spark3r.profile import Profile

from .budget import ResolvedBudget
from .latency_timing import LatencyTable
from .objective import Source
from .search import Found
from .verify import Decision, Verified


@dataclass(frozen=True)
class Calibration:
    """A profile and everything it was made of.

    Attributes:
        profile: The profile.
        budget: The budget on this device.
        source: What schedules were judged by.
        latency: What was timed before the search.
        verified: What was measured at the end, dense and the wall first.
        sensitivity: The sensitivities, None where dense met the budget.
        found: The search, likewise.
        decision: Which schedule is exported, likewise.
        gaps: Mean score of the chosen schedule on search, selection and held-out clips.
    """

    profile: Profile
    budget: ResolvedBudget
    source: Source
    latency: LatencyTable
    verified: tuple[Verified, ...]
    sensitivity: pd.DataFrame | None = None
    found: Found | None = None
    decision: Decision | None = None
    gaps: dict[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> Verified:
        """What the exported schedule measured; dense where it met the budget."""
        kind = "dense" if self.decision is None else self.decision.chosen.kind
        return next(each for each in self.verified if each.name == kind)

    @property
    def interrupted(self) -> bool:
        """Whether the search was stopped by Ctrl-C."""
        return self.found is not None and self.found.interrupted
