"""Lengths of clips: that which the latency model is fitted at, and that which a budget is for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from spark3r.errors import Spark3rError

from ..budget import Budget, time_text
from ..defaults import (
    DENSE_MARGIN,
    FITTED_FROM,
    FITTED_GROWTH,
    FITTED_S,
    FITTED_STEP,
    TARGET_LENGTHS,
    WALL_MARGIN,
)
from ..settings import Job
from .timing import TimedPass, time_passes, too_long


@dataclass(frozen=True)
class TargetLength:
    """The length that a budget must hold for, and the latencies that it was chosen by.

    Attributes:
        frames: The length in frames.
        dense_ms: Dense latency per clip of that length.
        wall_ms: Wall per clip of that length.
        meets_rule: Whether both margins hold. If not, no length meets them and this one comes
            nearest.
    """

    frames: int
    dense_ms: float
    wall_ms: float
    meets_rule: bool

    @property
    def text(self) -> str:
        """The choice in one line."""
        latencies = (
            f"about dense {time_text(self.dense_ms)}, wall {time_text(self.wall_ms)} per clip"
        )
        if self.meets_rule:
            return f"target length {self.frames} frames ({latencies})"
        return (
            f"target length {self.frames} frames ({latencies}): at every length the budget is too "
            "close to one of them"
        )


def choose_target_length(
    budget: Budget,
    latencies: Callable[[int], tuple[float, float]],
    lengths: Sequence[int] = TARGET_LENGTHS,
) -> TargetLength:
    """Return the shortest length at which the budget has a margin from dense and from the wall.

    Dense must take at least `DENSE_MARGIN` times the budget, and the budget must be at least
    `WALL_MARGIN` times the wall. If there is no such length, the one that comes nearest is
    returned, and `calibrate.budget.resolve` tells whether the budget is above dense or below the
    wall.

    Args:
        budget: The budget.
        latencies: Function from a length to dense latency and wall, in ms per clip. It is called in
            the order of ``lengths``, up to the chosen length.
        lengths: Lengths to choose from, the shortest first.

    Raises:
        ValueError: If ``lengths`` is empty.
    """
    best: TargetLength | None = None
    best_score = 0.0
    for frames in lengths:
        dense_ms, wall_ms = latencies(frames)
        clip_ms = budget.clip_ms(frames, dense_ms)
        score = min(dense_ms / (DENSE_MARGIN * clip_ms), clip_ms / (WALL_MARGIN * wall_ms))
        if score >= 1:
            return TargetLength(frames, dense_ms, wall_ms, meets_rule=True)
        if best is None or score > best_score:
            best, best_score = TargetLength(frames, dense_ms, wall_ms, meets_rule=False), score
    if best is None:
        raise ValueError("there is no length to choose from")
    return best


@dataclass(frozen=True)
class ShortPasses:
    """Latencies at the greatest length at which a dense pass is short.

    Attributes:
        frames: The length.
        dense_ms: Dense latency; None if dense does not fit at any length.
        wall_ms: The wall.
    """

    frames: int
    dense_ms: float | None
    wall_ms: float

    def extended(self, frames: int) -> tuple[float, float]:
        """Return estimates of dense latency and of the wall at another length, in ms per clip.

        The wall grows with the length, the rest of a dense pass with its square. A dense pass that
        does not fit counts as a thousand walls.
        """
        ratio = frames / self.frames
        wall_ms = ratio * self.wall_ms
        if self.dense_ms is None:
            return 1e3 * wall_ms, wall_ms
        return wall_ms + ratio**2 * max(0.0, self.dense_ms - self.wall_ms), wall_ms

    def mean_with(self, other: ShortPasses) -> ShortPasses:
        """Return the mean of two timings of one length, both with a dense latency."""
        if self.dense_ms is None or other.dense_ms is None:
            return self
        dense_ms = (self.dense_ms + other.dense_ms) / 2
        return ShortPasses(self.frames, dense_ms, (self.wall_ms + other.wall_ms) / 2)

    def longest_within(self, ms: float) -> int:
        """Return the greatest length at which `extended` dense latency is at most ``ms``."""
        if self.dense_ms is None:
            return 0
        square = max(self.dense_ms - self.wall_ms, 1e-9)
        root = math.sqrt(self.wall_ms**2 + 4 * square * ms)
        return int(self.frames * (root - self.wall_ms) / (2 * square))


def longest_short(job: Job, footage: Tensor, at_most: int) -> ShortPasses:
    """Return the greatest length at which a dense pass takes `FITTED_S`, and its latencies.

    Longer and longer clips are timed, each as long as the latencies of the one before allow, and at
    most `FITTED_GROWTH` times as long: a very short clip says little about attention. The shortest
    one has `FITTED_STEP` frames, however long that takes.

    Args:
        job: The job.
        footage: Frames ``[S, 3, H, W]`` to make clips of.
        at_most: Greatest length.

    Raises:
        Spark3rError: If a clip does not fit into memory even without global attention.
    """
    progress = job.reporter.step("length to time")
    on_cpu = job.runner.device.type == "cpu"  # elsewhere the first pass of a length takes longer
    frames, found = min(FITTED_STEP, at_most), None
    while True:
        progress(0 if found is None else found.frames, at_most)
        now = _short_passes(job, footage, frames, warmed_up=on_cpu and found is not None)
        if now.dense_ms is None and found is not None:
            break
        found = now
        frames = min(found.longest_within(1000 * FITTED_S), FITTED_GROWTH * found.frames)
        if frames < found.frames > FITTED_STEP:  # the length before promised too much
            frames = max(FITTED_STEP, frames // FITTED_STEP * FITTED_STEP)
            found = ShortPasses(frames, *found.extended(frames))
            break
        frames = at_most if frames >= at_most else frames // FITTED_STEP * FITTED_STEP
        if frames <= found.frames or at_most > frames < FITTED_FROM * found.frames:
            break
    if found.frames > FITTED_STEP:
        # The target length depends on these latencies, and a single pass may be disturbed.
        found = found.mean_with(_short_passes(job, footage, found.frames, warmed_up=on_cpu))
    progress(at_most, at_most)
    return found


def _short_passes(job: Job, footage: Tensor, frames: int, *, warmed_up: bool) -> ShortPasses:
    """Return the latencies of a length, a sample of each."""
    images = clip_of_length(footage, frames)
    passes = [
        TimedPass("wall", "wall", images, least=1),
        TimedPass("dense", "dense", images, least=1),
    ]
    timed = time_passes(job.runner, passes, timer=job.timer, limit_s=0.0, warmed_up=warmed_up)
    if "wall" not in timed:
        raise Spark3rError(too_long(frames))
    dense_ms = timed["dense"].median_ms if "dense" in timed else None
    return ShortPasses(frames, dense_ms, timed["wall"].median_ms)


def choose_target(job: Job, short: ShortPasses) -> int:
    """Return the target length of a job whose request names none.

    That is the shortest length for a deviation, and for a budget the length that
    `choose_target_length` returns. Nothing is timed at these lengths.
    """
    if job.settings.budget is None:
        return TARGET_LENGTHS[0]
    chosen = choose_target_length(job.settings.budget, short.extended)
    job.reporter.say(chosen.text)
    return chosen.frames


def clip_of_length(images: Tensor, frames: int) -> Tensor:
    """Return ``frames`` frames ``[S, 3, H, W]`` for timing, back and forth over the footage."""
    count = images.shape[0]
    period = max(1, 2 * count - 2)
    order = [i % period if i % period < count else period - i % period for i in range(frames)]
    return images[order]
