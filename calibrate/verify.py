"""Verification: which schedule is exported, and what it and its rivals measure on held-out clips.

Trials are judged on the clips of the search, and the best of many trials on few clips is partly
luck. So the best of each kind run again on other clips, the selection, and there the simpler of two
schedules stays unless the other is better beyond its interval. What that leaves runs a third time,
on held-out clips, beside dense and the wall; only those figures are reported as the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from spark3r.families import Family
from spark3r.schedule import Schedule
from spark3r.timing import Latency

from .comparison import PairedRatio, paired_ratio
from .evaluation import DenseRuns, evaluate
from .latency_timing import Treatment, time_passes
from .objective import Objective, Source, score
from .quality import Quality
from .search import Found, Trial

KINDS = ("uniform", "paper", "knapsack", "search")
"""Kinds of schedules, the simplest first. A trial's name begins with its kind."""


@dataclass(frozen=True)
class Judge:
    """Runs schedules on clips and scores them.

    Attributes:
        model: The model, unpatched between runs.
        family: What is known of it.
        source: What schedules are judged by.
        objective: Which metrics count.
    """

    model: nn.Module
    family: Family
    source: Source
    objective: Objective

    def qualities(self, schedule: Schedule, dense: DenseRuns) -> tuple[Quality, ...]:
        """Return the quality of a schedule on each clip."""
        return evaluate(self.model, schedule, dense, self.family)

    def scores(self, qualities: tuple[Quality, ...], dense: DenseRuns) -> dict[str, float]:
        """Return the score of each clip, by its name."""
        return {
            quality.clip: score(quality, reference, self.source, self.objective)
            for quality, reference in zip(qualities, dense.qualities, strict=True)
        }


@dataclass(frozen=True)
class Finalist:
    """The best schedule of one kind.

    Attributes:
        kind: One of `KINDS`.
        trial: Its trial on the clips of the search.
        selection: Its score on each clip of the selection.
    """

    kind: str
    trial: Trial
    selection: Mapping[str, float]

    @property
    def selection_score(self) -> float:
        """Mean score on the selection."""
        return math.fsum(self.selection.values()) / len(self.selection)


@dataclass(frozen=True)
class Decision:
    """Which finalist is exported, and why.

    Attributes:
        finalists: The best of each kind, the simplest kind first.
        chosen: The one to export.
        reasons: One line per comparison.
    """

    finalists: tuple[Finalist, ...]
    chosen: Finalist
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Verified:
    """What a treatment measured.

    Attributes:
        name: ``dense``, ``wall`` or a finalist's kind.
        schedule: The schedule, None for dense and the wall.
        predicted_ms: What the latency model says, None for dense and the wall.
        latency: Measured, per clip of the target length; None where dense does not fit.
        qualities: On the held-out clips; empty for the wall.
        scores: On the held-out clips, by name.
    """

    name: str
    schedule: Schedule | None
    predicted_ms: float | None
    latency: Latency | None
    qualities: tuple[Quality, ...]
    scores: Mapping[str, float]

    @property
    def score(self) -> float | None:
        """Mean score on the held-out clips, None for the wall."""
        return math.fsum(self.scores.values()) / len(self.scores) if self.scores else None


def kind_of(trial: Trial) -> str:
    """Return the kind of a trial's schedule."""
    return trial.name.partition(" ")[0]


def finalists(
    found: Found,
    judge: Judge,
    selection: DenseRuns,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Finalist, ...]:
    """Return the best trial within the budget of each kind, run again on the selection."""
    best: dict[str, Trial] = {}
    for trial in found.ranked():
        best.setdefault(kind_of(trial), trial)
    kinds = [kind for kind in KINDS if kind in best]
    chosen = []
    for number, kind in enumerate(kinds):
        qualities = judge.qualities(best[kind].schedule, selection)
        chosen.append(Finalist(kind, best[kind], judge.scores(qualities, selection)))
        progress(number + 1, len(kinds))
    return tuple(chosen)


def choose(candidates: tuple[Finalist, ...]) -> Decision:
    """Return the simplest finalist that no other beats beyond its interval.

    Raises:
        ValueError: If there is no finalist.
    """
    if not candidates:
        raise ValueError("no schedule within the budget could be run")
    chosen, reasons = candidates[0], []
    for rival in candidates[1:]:
        compared = ratio(rival.selection, chosen.selection)
        better = compared.is_lower
        reasons.append(
            f"{rival.kind} against {chosen.kind} on the selection: {compared}, "
            f"{'better beyond its interval' if better else 'not better beyond its interval'}"
        )
        if better:
            chosen = rival
    return Decision(candidates, chosen, tuple(reasons))


def ratio(candidate: Mapping[str, float], baseline: Mapping[str, float]) -> PairedRatio:
    """Compare scores, which are logarithms, clip by clip."""
    return paired_ratio(
        {clip: math.exp(value) for clip, value in candidate.items()},
        {clip: math.exp(value) for clip, value in baseline.items()},
    )


def verify(
    judge: Judge,
    decision: Decision,
    held_out: DenseRuns,
    images: Tensor,
    *,
    limit_s: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Verified, ...]:
    """Measure dense, the wall and every finalist: latency in turns, quality on held-out clips.

    Args:
        judge: Runs and scores.
        decision: The finalists.
        held_out: The held-out clips.
        images: A clip of the target length to time, ``[S, 3, H, W]``.
        limit_s: About how many seconds the timing may take.
        progress: Called with the steps done and their total.
    """
    schedules = {each.kind: each.trial.schedule for each in decision.finalists}
    treatments: dict[str, Treatment] = {"dense": "dense", "wall": "wall", **schedules}
    total = len(schedules) + 1
    latencies = time_passes(judge.model, images, treatments, family=judge.family, limit_s=limit_s)
    progress(1, total)
    dense_scores = judge.scores(held_out.qualities, held_out)
    verified = [
        Verified("dense", None, None, latencies.get("dense"), held_out.qualities, dense_scores),
        Verified("wall", None, None, latencies.get("wall"), (), {}),
    ]
    for number, each in enumerate(decision.finalists):
        qualities = judge.qualities(each.trial.schedule, held_out)
        verified.append(
            Verified(
                each.kind,
                each.trial.schedule,
                each.trial.latency_ms,
                latencies.get(each.kind),
                qualities,
                judge.scores(qualities, held_out),
            )
        )
        progress(number + 2, total)
    return tuple(verified)
