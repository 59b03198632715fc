"""Timings at the pace that the machine had when its latency model was fitted.

A machine is slower at one minute than at another: other programs run, or its clock rate falls. So
a short pass is timed in turns with whatever is timed, and all samples are divided by the ratio of
its latencies now and then. In this way timings of different minutes compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from spark3r.timing import Latency

from ..budget import time_text
from ..defaults import SAME_PACE
from ..settings import Job
from .timing import TimedPass, time_passes

_NAME = "pace"


@dataclass(frozen=True)
class Pace:
    """A short pass, and how long it took when the latency model was fitted.

    Attributes:
        what: The pass; the wall only if dense does not fit.
        images: The clip, ``[S, 3, H, W]``.
        ms: Its latency then.
    """

    what: Literal["dense", "wall"]
    images: Tensor
    ms: float

    @property
    def text(self) -> str:
        """The pace in words."""
        return f"{self.what} takes {time_text(self.ms)} for {self.images.shape[0]} frames"


@dataclass(frozen=True)
class PacedTimes:
    """Timings of one minute.

    Attributes:
        latencies: Latencies by name at the pace of the latency model, without passes that do not
            fit into memory.
        slowdown: How much slower the machine was when they were taken.
    """

    latencies: Mapping[str, Latency]
    slowdown: float


def time_at_pace(
    job: Job,
    pace: Pace,
    passes: Sequence[TimedPass],
    step: str,
) -> PacedTimes:
    """Return timings of passes, in turns with the pass that shows the pace.

    A change of pace up to `SAME_PACE` counts as none, since a single pass differs as much from the
    next. Where the clock is that of CPU time, because other programs run, a message says so.

    Args:
        job: The job.
        pace: The pass that shows the pace.
        passes: The passes to time.
        step: Name of the step, for its progress.
    """
    timed = time_passes(
        job.runner,
        [TimedPass(_NAME, pace.what, pace.images), *passes],
        timer=job.timer,
        limit_s=job.settings.timing_s,
        progress=job.reporter.step(step),
    )
    now = timed.pop(_NAME)
    say_clock(job, step, now)
    slowdown = now.median_ms / pace.ms
    if abs(slowdown - 1) <= SAME_PACE:
        slowdown = 1.0
    else:
        job.reporter.say(
            f"{step}: the machine takes {slowdown:.2f} times as long as when the latency model was "
            "fitted, and the timings are divided by that"
        )
    return PacedTimes(
        {name: latency.scaled(1 / slowdown) for name, latency in timed.items()}, slowdown
    )


def say_clock(job: Job, step: str, latency: Latency) -> None:
    """Tell the user if a latency is CPU time."""
    if latency.busy > 1:
        job.reporter.say(
            f"{step}: wall-clock time is {latency.busy:.1f} times the CPU time, so other programs "
            "use the processors: CPU time per thread is taken"
        )
