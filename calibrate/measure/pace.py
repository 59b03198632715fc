"""Timings at the pace that the machine had when its latency model was fitted.

A machine is slower at one minute than at another: other programs run, or its clock rate falls. So
two short passes, dense and the wall, are timed in turns with whatever is timed. Attention and
everything else slow down by different ratios, since the one computes and the other moves memory.
Each timing is divided by the ratio that its shares of both make. The median of three samples
counts, then and now: what disturbs a short pass for a moment hardly matters to the long ones that
it is for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from spark3r.latency import LatencyModel
from spark3r.schedule import Schedule
from spark3r.timing import Latency

from ..budget import time_text
from ..defaults import SAME_PACE, TYPICAL_SAMPLES
from ..settings import Job
from .timing import Pass, TimedPass, time_passes, typical

_WALL, _DENSE = "pace, wall", "pace, dense"


@dataclass(frozen=True)
class Pace:
    """Two short passes, and how long they took when the latency model was fitted.

    Attributes:
        images: The clip, ``[S, 3, H, W]``.
        wall_ms: The wall then.
        dense_ms: Dense latency then; None if dense does not fit.
    """

    images: Tensor
    wall_ms: float
    dense_ms: float | None

    @property
    def text(self) -> str:
        """The pace in words."""
        name, ms = ("the wall", self.wall_ms) if self.dense_ms is None else ("dense", self.dense_ms)
        return f"{name} takes {time_text(ms)} for {self.images.shape[0]} frames"

    def slowdowns(self, now: Mapping[str, Latency]) -> tuple[float, float]:
        """Return how much slower the wall is now, and everything beyond the wall."""
        now_wall_ms = typical(now[_WALL]).median_ms
        wall = now_wall_ms / self.wall_ms
        if self.dense_ms is None or _DENSE not in now:
            return wall, wall
        now_dense_ms = typical(now[_DENSE]).median_ms
        beyond_ms = now_dense_ms - now_wall_ms
        if beyond_ms <= 0 or self.dense_ms <= self.wall_ms:
            return wall, now_dense_ms / self.dense_ms
        return wall, beyond_ms / (self.dense_ms - self.wall_ms)


@dataclass(frozen=True)
class PacedTimes:
    """Timings of one minute.

    Attributes:
        latencies: Latencies by name at the pace of the latency model, without passes that do not
            fit into memory.
        slowdown: How much slower the machine was when they were taken, for the last pass.
    """

    latencies: Mapping[str, Latency]
    slowdown: float


def time_at_pace(
    job: Job, pace: Pace, model: LatencyModel, passes: Sequence[TimedPass], step: str
) -> PacedTimes:
    """Return timings of passes, in turns with the passes that show the pace.

    A change of pace up to `SAME_PACE` counts as none, since a single pass differs as much from the
    next. Where the clock is that of CPU time, because other programs run, a message says so.

    Args:
        job: The job.
        pace: The passes that show the pace.
        model: The latency model, which knows the share of the wall in a pass.
        passes: The passes to time.
        step: Name of the step, for its progress.
    """
    shown = [TimedPass(_WALL, "wall", pace.images, TYPICAL_SAMPLES)]
    if pace.dense_ms is not None:
        shown.append(TimedPass(_DENSE, "dense", pace.images, TYPICAL_SAMPLES))
    timed = time_passes(
        job.runner,
        [*shown, *passes],
        timer=job.timer,
        limit_s=job.settings.timing_s,
        progress=job.reporter.step(step),
    )
    say_clock(job, step, timed[_WALL])
    wall, beyond = pace.slowdowns(timed)
    latencies, slowdown = {}, 1.0
    for each in passes:
        share = _wall_share(job, model, each.what, each.images)
        slowdown = share * wall + (1 - share) * beyond
        if abs(slowdown - 1) <= SAME_PACE:
            slowdown = 1.0
        if each.name in timed:
            latencies[each.name] = timed[each.name].scaled(1 / slowdown)
    if slowdown != 1:
        job.reporter.say(
            f"{step}: the machine takes {slowdown:.2f} times as long as when the latency model was "
            "fitted, and the timings are divided by that"
        )
    return PacedTimes(latencies, slowdown)


def _wall_share(job: Job, model: LatencyModel, what: Pass, images: Tensor) -> float:
    if what == "wall":
        return 1.0
    layout = job.runner.layout(images)
    schedule = what if isinstance(what, Schedule) else Schedule.dense(job.depth)
    return min(1.0, model.wall_ms(layout) / model.predict_ms(schedule, layout))


def say_clock(job: Job, step: str, latency: Latency) -> None:
    """Tell the user if a latency is CPU time."""
    if latency.busy > 1:
        job.reporter.say(
            f"{step}: wall-clock time is {latency.busy:.1f} times the CPU time, so other programs "
            "use the processors: CPU time per thread is taken"
        )
