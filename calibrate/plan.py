"""The runs of a calibration by step, and how they are fitted into a time limit.

Nothing here needs torch, because a plan is printed within two seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from .defaults import (
    FRONT_POINTS,
    KINDS,
    KNAPSACK_SHARES,
    LEAST_CLIPS,
    LEAST_TRIALS,
    OPERATORS,
    PLAN_MARGIN,
    PROBED_CLIPS,
    TRADE_OFF_CLIPS,
    probed_of,
)

BASELINES = 4
"""Approximate number of pairs of factors on a frontier of baselines."""

DRIFT_RUNS = 12
"""Approximate time of a pass in which every layer also runs at every factor, in reduced runs. 10
and 16 were measured."""


class ClipCounts(NamedTuple):
    """Number of clips by role."""

    search: int
    validation: int
    held_out: int


@dataclass(frozen=True)
class Work:
    """What a calibration runs on clips.

    Attributes:
        clips: Number of clips by role.
        trials: Trials of the search beyond those of the initial schedules; 0 searches nothing.
        depth: Number of global attention layers.
        within_deviation: Whether a deviation is the limit instead of a budget.
    """

    clips: ClipCounts
    trials: int
    depth: int
    within_deviation: bool = False

    def runs(self) -> dict[str, int]:
        """Return the number of runs of each step that runs the clips."""
        clips, few = self.clips, probed_of(self.clips.search)
        # A layer is probed on each axis, with all operators of that axis.
        rules = len({each.query for each in OPERATORS}) + len(
            {each.key_value for each in OPERATORS}
        )
        measured = {
            "dense runs": clips.search + clips.held_out + clips.validation * bool(self.trials),
            "drift": DRIFT_RUNS * max(1, clips.search - few),
            "sensitivity": self.depth * rules * few,  # if drift can be trusted
        }
        if not self.trials:
            return measured | {"verification": clips.held_out}
        knapsacks = 1 + len(KNAPSACK_SHARES)
        frontiers = knapsacks if self.within_deviation else 1
        initial = knapsacks + frontiers * BASELINES * (1 + len(OPERATORS))
        return measured | {
            "paper's probe": (self.depth + 1) * min(PROBED_CLIPS, clips.search),
            "search": (initial + self.trials) * clips.search,
            "selection": len(KINDS) * clips.validation,
            "trade-off": FRONT_POINTS * min(TRADE_OFF_CLIPS, clips.validation),
            "verification": len(KINDS) * clips.held_out,
        }

    def smaller(self) -> Work | None:
        """Return less work of the same kind, None if there is none.

        First there are fewer trials, then fewer clips to validate and report on, and at last
        nothing is searched.
        """
        clips = self.clips
        if self.trials > LEAST_TRIALS:
            return replace(self, trials=max(LEAST_TRIALS, self.trials // 2))
        fewer = clips._replace(
            validation=_halved(clips.validation), held_out=_halved(clips.held_out)
        )
        if fewer != clips:
            return replace(self, clips=fewer)
        return replace(self, trials=0) if self.trials else None

    @property
    def text(self) -> str:
        """The amounts in words."""
        clips = self.clips
        if not self.trials:
            return f"no search, {clips.held_out} held-out clips"
        return (
            f"{self.trials} trials, {clips.validation} validation and {clips.held_out} held-out "
            "clips"
        )


@dataclass(frozen=True)
class Plan:
    """Work with its duration.

    Attributes:
        work: The work.
        total_s: Expected seconds of the whole calibration.
        after_search_s: Expected seconds of what follows the search.
    """

    work: Work
    total_s: float
    after_search_s: float


def plan_within(
    work: Work, run_s: float, timing_s: float, spent_s: float, limit_s: float | None
) -> Plan:
    """Return the largest plan within a time limit, or the smallest one if none is.

    Args:
        work: The work without a limit.
        run_s: Seconds of a run of a clip with its quality.
        timing_s: Seconds of the timings at the target length that are left.
        spent_s: Seconds that have passed.
        limit_s: The limit in seconds; None plans the whole work.
    """
    while True:
        seconds = {step: PLAN_MARGIN * run_s * runs for step, runs in work.runs().items()}
        after = ("selection", "trade-off", "verification")
        after_search_s = sum(seconds.get(step, 0.0) for step in after) + timing_s / 2
        plan = Plan(work, spent_s + timing_s + sum(seconds.values()), after_search_s)
        smaller = work.smaller()
        if limit_s is None or plan.total_s <= limit_s or smaller is None:
            return plan
        work = smaller


def _halved(clips: int) -> int:
    return min(clips, max(LEAST_CLIPS, clips // 2))


def duration_text(seconds: float) -> str:
    """Return a duration such as ``45 s`` or ``2 min 10 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min" if not rest else f"{minutes} min {rest} s"
