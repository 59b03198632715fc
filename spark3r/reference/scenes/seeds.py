"""Ranges of the renderer's seeds by purpose. They never overlap and never change."""

from __future__ import annotations

TRAINING = range(0, 1_000_000)
CALIBRATION = range(1_000_000, 1_100_000)
EVALUATION = range(2_000_000, 2_100_000)
