"""Clip length, noise and learning rate of each training step."""

from __future__ import annotations

import random

FRAMES_PER_PROCESS = 16
FLICKER_STEPS = 18_000
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
)


def clip_shape(step: int, seed: int) -> tuple[int, int]:
    """Return the size of a step's batch, which is the same in every process.

    Args:
        step: Index of the step.
        seed: Seed of the run.

    Returns:
        Clips per process and frames per clip.
    """
    lengths = next(mix for start, mix in reversed(STAGES) if step >= start)
    draw = random.Random(seed * 1_000_003 + step)
    frames = draw.choices(list(lengths), list(lengths.values()))[0]
    return max(1, FRAMES_PER_PROCESS // frames), frames


def flicker(step: int) -> float:
    """Return the strength of noise and changes of exposure, 0 from `FLICKER_STEPS` on.

    Args:
        step: Index of the step.
    """
    return 1.0 if step < FLICKER_STEPS else 0.0


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
