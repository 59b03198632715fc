"""Clip length, image size, sources and learning rate of each training step."""

from __future__ import annotations

import random
from dataclasses import dataclass

FRAMES_PER_PROCESS = 16
WARM_UP_STEPS = 150
MUON_RATE = 0.012
ADAM_RATE = 0.0015

# First step of each stage, and the probability of each clip length in it. Pairs come first, because
# they teach matching fastest, and a model that cannot match predicts the pose of the average clip.
STAGES: tuple[tuple[int, dict[int, float]], ...] = (
    (0, {2: 0.7, 4: 0.3}),
    (800, {2: 0.3, 4: 0.4, 8: 0.3}),
    (2000, {2: 0.15, 4: 0.25, 8: 0.6}),
    (3000, {2: 0.1, 4: 0.2, 8: 0.5, 16: 0.15, 24: 0.05}),
    # Long clips last: a model that has seen few of them loses its way over 48 frames.
    (35_500, {2: 0.1, 4: 0.15, 8: 0.35, 16: 0.2, 24: 0.2}),
)

# Height and width in pixels, and the probability of each: what footage of 1:1, 4:3, 16:9, 9:16 and
# 3:4 becomes at about 64 patches of 8x8.
SIZES: dict[tuple[int, int], float] = {
    (64, 64): 0.3,
    (56, 72): 0.3,
    (48, 88): 0.18,
    (88, 48): 0.14,
    (72, 56): 0.08,
}

# The share of each source among a step's clips; sources that the pool lacks at a step's size and
# length leave theirs to the others.
SOURCES: dict[str, float] = {"v1": 0.3, "v2": 0.55, "path": 0.45}


@dataclass(frozen=True)
class BatchShape:
    """The size of a step's batch, which is the same in every process.

    Attributes:
        clips: Clips per process.
        frames: Frames per clip.
        size: Height and width of a frame in pixels.
    """

    clips: int
    frames: int
    size: tuple[int, int]


def batch_shape(step: int, seed: int) -> BatchShape:
    """Return the size of a step's batch.

    Args:
        step: Index of the step.
        seed: Seed of the run.
    """
    lengths = next(mix for start, mix in reversed(STAGES) if step >= start)
    draw = random.Random(seed * 1_000_003 + step)
    frames = draw.choices(list(lengths), list(lengths.values()))[0]
    size = draw.choices(list(SIZES), list(SIZES.values()))[0]
    return BatchShape(max(1, FRAMES_PER_PROCESS // frames), frames, size)


def rate_factor(step: int, elapsed: float, length: float, decay: float) -> float:
    """Return the factor of the learning rates: warm-up, a constant part, and a linear decay to 0.

    Args:
        step: Index of the step.
        elapsed: Seconds since the session began.
        length: Length of the session in seconds.
        decay: Share of the session, at its end, in which the rate decays; 0 for no decay. Above 1
            the session begins below the full rate.

    Returns:
        The factor, 0 to 1.
    """
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    if decay <= 0:
        return warm
    return warm * min(1.0, max(0.0, (length - elapsed) / (decay * length)))
