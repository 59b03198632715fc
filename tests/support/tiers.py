"""What the fast tier, ``pytest -m "not slow"``, repeats less often than the whole suite."""

from __future__ import annotations

from hypothesis import settings

SHARE = 3
"""The fast tier draws one random example where the whole suite draws this many."""

DEFAULT_EXAMPLES = 100
"""Hypothesis's own."""

_is_fast = False


def choose(markers: str) -> None:
    """Choose the tier by pytest's ``-m`` expression, before test modules are imported."""
    global _is_fast
    _is_fast = "not slow" in markers
    settings.register_profile("tier", max_examples=examples(DEFAULT_EXAMPLES))
    settings.load_profile("tier")


def examples(count: int) -> int:
    """Return how many random examples to draw: ``count`` in the whole suite, fewer in the fast."""
    return count // SHARE if _is_fast else count
