"""The result of a calibration: a profile and everything that was measured for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from spark3r.profile import Profile

from ..budget import ResolvedBudget
from ..clips import Split
from ..defaults import Source
from ..measure.measurements import Latencies, LatencyTable, Sensitivities
from ..measure.pace import Pace
from ..search.optimizer import Found
from ..settings import Job, Settings
from ..verify.correction import Outcome
from ..verify.held_out import Verification, Verified
from ..verify.selection import Decision
from .profile import make_profile
from .trade_off import TradeOff


@dataclass(frozen=True)
class Calibration:
    """A profile and everything that was measured for it.

    Attributes:
        profile: The profile.
        settings: The request.
        source: What schedules were judged by.
        split: Clips by role.
        budget: The budget at the target length. Within a deviation it is the latency found.
        latency: Latencies at the target length, and the last corrected latency model.
        pace: The passes that show the pace at which all latencies hold.
        slowdowns: How much slower the machine was whenever schedules were timed.
        verification: Measurements at the end.
        sensitivities: Sensitivities of the layers; None if dense met the budget.
        outcome: The search and its decision; None if dense met the budget.
        origin: Earlier profile that the measurements are from; None if they were measured.
        interrupted: Whether Ctrl-C stopped the search or a later step.
        seconds: Time of each step by name.
        elapsed_s: Time of everything.
    """

    profile: Profile
    settings: Settings
    source: Source
    split: Split
    budget: ResolvedBudget
    latency: LatencyTable
    pace: Pace
    slowdowns: tuple[float, ...]
    verification: Verification
    sensitivities: Sensitivities | None
    outcome: Outcome | None
    origin: Path | None
    interrupted: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    elapsed_s: float = 0.0

    @property
    def decision(self) -> Decision | None:
        """The exported schedule and the reasons for it; None if dense met the budget."""
        return None if self.outcome is None else self.outcome.decision

    @property
    def found(self) -> Found | None:
        """The search; None if nothing was searched."""
        return self.outcome.found if self.outcome and self.outcome.found.was_run else None

    @property
    def chosen(self) -> Verified:
        """Measurements of the exported schedule, or of dense if that met the budget."""
        if self.decision is None:
            return self.verification.dense
        kind = self.decision.chosen.kind
        return next(each for each in self.verification.schedules if each.name == kind)

    @property
    def gaps(self) -> dict[str, float]:
        """Mean score of the exported schedule on the clips of each role; empty without a search."""
        if self.decision is None or self.found is None:
            return {}
        trial = self.decision.chosen.trial
        scores = {
            "search": None if trial.score is None else trial.score.mean,
            "validation": self.decision.chosen.validation_score,
            "held out": self.chosen.score,
        }
        return {role: score for role, score in scores.items() if score is not None}

    @property
    def dense_ms(self) -> float:
        """Dense latency per clip, predicted where it was not timed."""
        return self.latency.dense_ms

    @property
    def wall_ms(self) -> float:
        """The wall per clip."""
        return self.latency.wall.median_ms

    @property
    def allowed_ms(self) -> float:
        """Largest latency per clip."""
        return self.budget.clip_ms

    def dense_runs(self, *steps: str) -> float | None:
        """Return the time of steps in dense runs of a search clip with its quality, if they ran."""
        runs = self.seconds.get("dense, search")
        taken = [self.seconds[step] for step in steps if step in self.seconds]
        if not runs or not taken:
            return None
        return sum(taken) / (runs / len(self.split.search))


def make_result(
    job: Job,
    split: Split,
    latencies: Latencies,
    budget: ResolvedBudget,
    origin: Path | None,
    sensitivities: Sensitivities | None = None,
    outcome: Outcome | None = None,
    trade_off: TradeOff | None = None,
) -> Calibration:
    """Return the result of a calibration. It ends with the budget if dense meets that."""
    table = latencies.table
    slowdowns: tuple[float, ...] = ()
    if outcome is None:
        verification = Verification(Verified("dense", table.dense), Verified("wall", table.wall))
    else:
        verification, times = outcome.verification, outcome.times
        errors = {**table.errors, **times.errors}
        table = replace(table, model=outcome.problem.latency, errors=errors)
        slowdowns = tuple(times.slowdowns)
    trade_off = trade_off or TradeOff()
    stopped = outcome is not None and (outcome.interrupted or outcome.found.interrupted)
    return Calibration(
        profile=make_profile(
            job,
            split,
            table,
            budget,
            latencies.pace,
            verification,
            None if outcome is None else outcome.decision,
            () if sensitivities is None else sensitivities.records,
            trade_off,
        ),
        settings=job.settings,
        source=job.source,
        split=split,
        budget=budget,
        latency=table,
        pace=latencies.pace,
        slowdowns=slowdowns,
        verification=verification,
        sensitivities=sensitivities,
        outcome=outcome,
        origin=origin,
        interrupted=stopped or trade_off.interrupted,
    )
