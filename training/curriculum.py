"""How long the clips of a step are, how much they flicker, and how fast it learns."""

from __future__ import annotations

import random

FRAMES_PER_PROCESS = 16
FLICKER_STEPS = 18_000
WARM_UP_STEPS = 150
MUON_RATE = 0.012
ADAM_RATE = 0.0015

# From which step on, which clip lengths, how often. Pairs first: they teach matching fastest, and
# a model that has not learned to match stays at the pose of the average clip.
STAGES: tuple[tuple[int, dict[int, float]], ...] = (
    (0, {2: 0.7, 4: 0.3}),
    (800, {2: 0.3, 4: 0.4, 8: 0.3}),
    (2000, {2: 0.15, 4: 0.25, 8: 0.6}),
    (3000, {2: 0.1, 4: 0.2, 8: 0.5, 16: 0.15, 24: 0.05}),
)


def clip_shape(step: int, seed: int) -> tuple[int, int]:
    """Choose a step's clips, alike in every process.

    Args:
        step: The step.
        seed: The run's seed.

    Returns:
        Clips per process and frames per clip.
    """
    lengths = next(mix for start, mix in reversed(STAGES) if step >= start)
    draw = random.Random(seed * 1_000_003 + step)
    frames = draw.choices(list(lengths), list(lengths.values()))[0]
    return max(1, FRAMES_PER_PROCESS // frames), frames


def flicker(step: int) -> float:
    """Return the strength of noise and changes of exposure: the last steps learn clean clips.

    Args:
        step: The step.
    """
    return 1.0 if step < FLICKER_STEPS else 0.0


def rate_factor(step: int, elapsed: float, length: float, decay: float) -> float:
    """Warm up over steps, stay, and fall to zero over the last part of the sitting.

    Args:
        step: The step.
        elapsed: Seconds since the sitting began.
        length: Seconds the sitting lasts.
        decay: Share of the sitting over which the rate falls linearly to 0; 0 for no decay.

    Returns:
        Factor on the learning rates, 0 to 1.
    """
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    if decay <= 0:
        return warm
    return warm * min(1.0, max(0.0, (length - elapsed) / (decay * length)))
