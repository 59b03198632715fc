"""The result of a calibration: a profile and everything that was measured for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from spark3r.profile import Profile

from ..budget import Budget, ResolvedBudget
from ..clips import Split
from ..defaults import Objective, Source
from ..measure.measurements import Latencies, Sensitivities
from ..measure.timing import LatencyTable
from ..search.optimizer import Found, Trial
from ..settings import Job, Settings
from ..verify.correction import Outcome
from ..verify.held_out import Verification, Verified, time_beside_the_wall
from ..verify.selection import Decision
from .profile import Evidence, make_profile
from .trade_off import TradeOffRuns


@dataclass(frozen=True)
class Calibration:
    """A profile and everything that was measured for it.

    Attributes:
        profile: The profile.
        budget: The budget on this device.
        source: What schedules were judged by.
        objective: Metrics that counted.
        latency: Timings before the search, and the last corrected latency model.
        verification: Measurements at the end.
        sensitivity: Sensitivities; None if dense met the budget.
        found: The search; None if dense met the budget, or with an earlier profile.
        decision: The exported schedule and the reasons; None if dense met the budget.
        gaps: Mean score of the exported schedule on the clips of each role.
        was_stopped: Whether Ctrl-C cut selection, verification or the trade-off short.
        seconds: Time of each step by name.
        searched_clips: Number of search clips.
        sensitive: Sensitive layers by the paper's probe; empty if it did not run.
        max_deviation: Largest deviation; None if there was a budget.
        origin: Earlier profile whose sensitivities and latency model were taken; None if they were
            measured.
        skipped: Frames that could not be read, with the reason.
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
        """Measurements of the exported schedule, or of dense if that met the budget."""
        if self.decision is None:
            return self.verification.dense
        kind = self.decision.chosen.kind
        return next(each for each in self.verification.schedules if each.name == kind)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C stopped the search or a later step."""
        return self.was_stopped or (self.found is not None and self.found.interrupted)

    @property
    def dense_then_and_now(self) -> float | None:
        """Dense latency at the end ÷ before the search; None if it was not timed twice."""
        now = self.verification.dense.latency
        if now is None or self.latency.dense_extrapolated:
            return None
        return now.median_ms / self.latency.dense_ms

    @property
    def dense_ms(self) -> float:
        """Dense latency, from the end of the calibration if it was timed there."""
        now = self.verification.dense.latency
        return self.latency.dense_ms if now is None else now.median_ms

    @property
    def dense_extrapolated(self) -> bool:
        """Whether dense was never timed, because it does not fit at the target length."""
        return self.verification.dense.latency is None and self.latency.dense_extrapolated

    @property
    def wall_ms(self) -> float:
        """The wall, from the end of the calibration if it was timed there."""
        now = self.verification.wall.latency
        return self.latency.wall_ms if now is None else now.median_ms

    @property
    def allowed_ms(self) -> float:
        """Largest latency, with a relative budget of dense latency at the end."""
        return self.budget.beside(self.verification.dense.latency)

    def dense_runs(self, *steps: str) -> float | None:
        """Return the time of steps in dense runs of a search clip with its quality, if they ran."""
        runs = self.seconds.get("dense, search")
        taken = [self.seconds[step] for step in steps if step in self.seconds]
        if not runs or not taken:
            return None
        return sum(taken) / (runs / self.searched_clips)


def dense_result(
    job: Job, split: Split, latencies: Latencies, budget: ResolvedBudget, origin: Path | None
) -> Calibration:
    """Return the result if dense meets the budget.

    Args:
        job: The job.
        split: Clips by role.
        latencies: Latencies at the target length.
        budget: The budget at that length.
        origin: Earlier profile that the latency model is from, None if it was fitted.
    """
    table = latencies.table
    if not table.passes:  # an earlier profile has no timings of today
        timed = time_beside_the_wall(job, {}, latencies.images, "latency")
        table = replace(table, passes=timed)
    verification = Verification(
        Verified("dense", table.passes.get("dense")), Verified("wall", table.passes.get("wall"))
    )
    evidence = Evidence(job, split, table, budget)
    return Calibration(
        profile=make_profile(evidence, verification, None, (), TradeOffRuns()),
        budget=budget,
        source=job.source,
        objective=job.settings.objective,
        latency=table,
        verification=verification,
        origin=origin,
    )


def as_budget(
    settings: Settings, trial: Trial, latencies: Latencies, minimum_ms: float
) -> ResolvedBudget:
    """Return the latency found within a deviation as a budget."""
    asked = Budget(settings.goal_text, "clip", trial.latency_ms)
    return ResolvedBudget(
        asked, latencies.frames, trial.latency_ms, latencies.table.dense_ms, minimum_ms
    )


def make_result(
    job: Job,
    split: Split,
    latencies: Latencies,
    sensitivities: Sensitivities,
    budget: ResolvedBudget,
    outcome: Outcome,
    trade_off: TradeOffRuns,
    origin: Path | None,
) -> Calibration:
    """Return the result of a calibration that exports a schedule.

    Args:
        job: The job.
        split: Clips by role.
        latencies: Latencies at the target length.
        sensitivities: Sensitivities of the layers.
        budget: The budget.
        outcome: The decision and its verification.
        trade_off: Slower and faster schedules.
        origin: Earlier profile that the measurements are from, None if they were measured.
    """
    chosen, found = outcome.decision.chosen, outcome.found
    table = replace(latencies.table, model=outcome.problem.latency)
    result = Calibration(
        profile=make_profile(
            Evidence(job, split, table, budget),
            outcome.verification,
            outcome.decision,
            sensitivities.records,
            trade_off,
        ),
        budget=budget,
        source=job.source,
        objective=job.settings.objective,
        latency=table,
        verification=outcome.verification,
        sensitivity=sensitivities.table,
        found=found if found.was_run else None,
        decision=outcome.decision,
        was_stopped=outcome.interrupted or trade_off.interrupted,
        searched_clips=len(split.search),
        sensitive=sensitivities.sensitive,
        max_deviation=job.settings.max_deviation,
        origin=origin,
    )
    if not found.was_run:
        return result
    gaps = {
        "search": chosen.trial.score.mean if chosen.trial.score else None,
        "validation": chosen.validation_score,
        "held out": result.chosen.score,
    }
    return replace(result, gaps={role: gap for role, gap in gaps.items() if gap is not None})
