"""Which seeds of path-traced rooms are for what. The ranges never overlap and never change."""

from __future__ import annotations

JUDGING = range(0, 100)  # never trained or tuned on
VALIDATION = range(100, 200)  # chooses the best weights of a run
TRAINING = range(1000, 1_000_000)
