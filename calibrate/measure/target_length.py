"""The target length: the clip length that a budget must hold for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from spark3r.errors import Spark3rError
from spark3r.reduction.rule import ResolvedRule

from ..budget import Budget, time_text
from ..clips import Split
from ..defaults import DENSE_MARGIN, TARGET_LENGTHS, WALL_MARGIN
from ..settings import Job
from .timing import time_layers, time_passes


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
        latencies = f"dense {time_text(self.dense_ms)}, wall {time_text(self.wall_ms)} per clip"
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


def target_frames(job: Job, split: Split) -> int:
    """Return the target length of a job in frames.

    That is `Settings.target_frames`. If it is None, it is the shortest length for a deviation, and
    for a budget the length that `choose_target_length` returns, with dense and the wall timed at
    each length.

    Raises:
        Spark3rError: If a clip does not fit into memory even without global attention.
    """
    settings = job.settings
    if settings.target_frames is not None:
        return settings.target_frames
    if settings.budget is None:
        return TARGET_LENGTHS[0]
    progress = job.reporter.step("target length")

    def latencies(frames: int) -> tuple[float, float]:
        progress(TARGET_LENGTHS.index(frames), len(TARGET_LENGTHS))
        return dense_and_wall(job, clip_of_length(split.search[0].images, frames))

    chosen = choose_target_length(settings.budget, latencies)
    progress(len(TARGET_LENGTHS), len(TARGET_LENGTHS))
    job.reporter.say(chosen.text)
    return chosen.frames


def dense_and_wall(job: Job, images: Tensor) -> tuple[float, float]:
    """Return estimates of dense latency and of the wall, in ms per clip.

    Dense is estimated from the wall and one layer. That takes a fraction of the time, and works if
    dense does not fit. A layer that does not fit counts as a thousand walls.

    Args:
        job: The job.
        images: The clip, ``[S, 3, H, W]``.

    Raises:
        Spark3rError: If a clip does not fit into memory even without global attention.
    """
    limit_s = job.settings.timing_s / 8
    passes = time_passes(job.runner, images, {"wall": "wall"}, timer=job.timer, limit_s=limit_s)
    if "wall" not in passes:
        raise Spark3rError(
            f"a clip of {images.shape[0]} frames does not fit even without global attention: give "
            "a shorter --target-frames"
        )
    wall_ms = passes["wall"].median_ms
    rule = ResolvedRule()
    layers = dict(time_layers(job.runner, images, [rule], timer=job.timer, limit_s=limit_s))
    if rule not in layers:
        return 1e3 * wall_ms, wall_ms
    layer_ms = layers[rule].median_ms - layers[None].median_ms
    return wall_ms + job.depth * max(0.0, layer_ms), wall_ms


def clip_of_length(images: Tensor, frames: int) -> Tensor:
    """Return ``frames`` frames ``[S, 3, H, W]`` for timing, back and forth over the footage."""
    count = images.shape[0]
    period = max(1, 2 * count - 2)
    order = [i % period if i % period < count else period - i % period for i in range(frames)]
    return images[order]
