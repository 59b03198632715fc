"""The result of a calibration: a profile and everything it was made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from spark3r.profile import Profile

from ..budget import Budget, ResolvedBudget
from ..clips import Split
from ..defaults import Objective, Source
from ..measure.timing import LatencyTable
from ..search.optimizer import Found, Trial
from ..settings import Job, Settings
from ..verify.held_out import Verification, Verified
from ..verify.selection import Decision
from .profile import Evidence, make_profile


@dataclass(frozen=True)
class Calibration:
    """A profile and everything it was made of.

    Attributes:
        profile: The profile.
        budget: The budget on this device.
        source: What schedules were judged by.
        objective: Which metrics counted.
        latency: What was timed before the search, and the latency model that was right in the end.
        verification: Everything that was measured at the end.
        sensitivity: The sensitivities, None where dense met the budget.
        found: The search, likewise.
        decision: Which schedule is exported, likewise.
        gaps: Mean score of the chosen schedule on search, selection and held-out clips.
        was_stopped: Whether Ctrl-C cut selection, verification or the trade-off short.
        seconds: How long each step took, by name.
        searched_clips: Number of clips of the search.
        sensitive: Layers that are sensitive by the paper's probe, where that ran.
        max_deviation: The largest deviation asked for, None where there was a budget.
        origin: The earlier profile whose sensitivities and latency model were taken; None where
            they were measured.
        skipped: What could not be read of the footage, with the reason.
    """

    profile: Profile
    budget: ResolvedBudget
    source: Source
    objective: Objective
    latency: LatencyTable
    verification: Verification
    sensitivity: pd.DataFrame | None = None
    found: Found | None = None
    decision: Decision | None = None
    gaps: dict[str, float] = field(default_factory=dict)
    was_stopped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    searched_clips: int = 1
    sensitive: tuple[int, ...] = ()
    max_deviation: float | None = None
    origin: Path | None = None
    skipped: tuple[str, ...] = ()

    @property
    def chosen(self) -> Verified:
        """What the exported schedule measured; dense where it met the budget."""
        if self.decision is None:
            return self.verification.dense
        kind = self.decision.chosen.kind
        return next(each for each in self.verification.schedules if each.name == kind)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C stopped the search or what follows it."""
        return self.was_stopped or (self.found is not None and self.found.interrupted)

    @property
    def dense_then_and_now(self) -> float | None:
        """Dense latency beside the verified schedules over that before the search, if timed."""
        now = self.verification.dense.latency
        if now is None or self.latency.dense_extrapolated:
            return None
        return now.median_ms / self.latency.dense_ms

    @property
    def dense_ms(self) -> float:
        """Dense latency, beside the verified schedules where it was timed there."""
        now = self.verification.dense.latency
        return self.latency.dense_ms if now is None else now.median_ms

    @property
    def dense_extrapolated(self) -> bool:
        """Whether dense was nowhere timed, since it does not fit at the target length."""
        return self.verification.dense.latency is None and self.latency.dense_extrapolated

    @property
    def wall_ms(self) -> float:
        """The wall, likewise."""
        now = self.verification.wall.latency
        return self.latency.wall_ms if now is None else now.median_ms

    @property
    def allowed_ms(self) -> float:
        """The budget, a relative one taken of dense as it was beside the verified schedules."""
        return self.budget.beside(self.verification.dense.latency)

    def forwards(self, *steps: str) -> float | None:
        """Return how many dense runs of a calibration clip, with its quality, steps were worth."""
        runs = self.seconds.get("dense, search")
        taken = [self.seconds[step] for step in steps if step in self.seconds]
        if not runs or not taken:
            return None
        return sum(taken) / (runs / self.searched_clips)


def dense_result(
    job: Job, split: Split, table: LatencyTable, budget: ResolvedBudget
) -> Calibration:
    """Return the result where dense meets the budget as it is."""
    passes = table.passes
    verification = Verification(
        Verified("dense", passes.get("dense")), Verified("wall", passes.get("wall"))
    )
    profile = make_profile(Evidence(job, split, table, budget), verification, None)
    return Calibration(profile, budget, job.source, job.settings.objective, table, verification)


def as_budget(
    settings: Settings, found: Trial, frames: int, table: LatencyTable, minimum_ms: float
) -> ResolvedBudget:
    """Return the latency that was found within a deviation as if it had been the budget."""
    asked = Budget(settings.asked, "clip", found.latency_ms)
    return ResolvedBudget(asked, frames, found.latency_ms, table.dense_ms, minimum_ms)
