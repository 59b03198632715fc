"""The numbers and choices of a calibration that a user may ask about. Nothing here needs torch."""

from __future__ import annotations

from typing import Literal

Objective = Literal["balanced", "depth", "pose", "points"]
"""Which metrics count."""

Source = Literal["error", "consistency", "deviation"]
"""What schedules are judged by."""

FRAMES = 24
"""Default of ``--frames``."""

TRIALS = 12
"""Default of ``--trials``, and of `calibrate.calibrate`."""
