"""Acceptance criteria: what a result must reach, and whether it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from results_io import print_markdown


@dataclass(frozen=True)
class Criterion:
    """One acceptance criterion.

    Attributes:
        requirement: The condition, in words.
        measured: The measured value, in words; empty if there is none.
        met: Whether the value meets the condition; None if it was not measured.
    """

    requirement: str
    measured: str
    met: bool | None


def print_criteria(criteria: Sequence[Criterion]) -> None:
    """Print criteria as a Markdown table; nothing if there are none."""
    if not criteria:
        return
    verdicts = {True: "met", False: "**not met**", None: "not measured"}
    print()
    print_markdown(
        ("criterion", "measured", ""),
        [(each.requirement, each.measured, verdicts[each.met]) for each in criteria],
    )
