"""Goals: the best quality within a budget, or the least latency within a deviation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from spark3r.schedule import Schedule

from .damage import POWER
from .space import ROUNDING, Space

AIM = 0.98
"""Share of a budget that is searched for: the same schedule takes some percent more or less from
one pass to the next, and most passes shall keep to the budget."""


@dataclass(frozen=True)
class WithinBudget:
    """The least score of all schedules that are fast enough.

    Attributes:
        budget_ms: Latency that a clip may take.
    """

    budget_ms: float

    @property
    def aim_ms(self) -> float:
        """Latency that is aimed at."""
        return AIM * self.budget_ms

    def parameters(self, space: Space) -> tuple[str, ...]:
        """Return the names of the search's parameters."""
        return space.parameters()

    def proposed(self, space: Space, parameters: Mapping[str, float]) -> Schedule | None:
        """Return the schedule that parameters stand for, within the budget; None if none is."""
        aimed = space.schedule(self.aim_ms, parameters)
        return space.schedule(self.budget_ms, parameters) if aimed is None else aimed

    def value(self, latency_ms: float, score: float) -> float:
        """Return what is minimised."""
        return score

    def excess(self, latency_ms: float, score: float | None) -> float:
        """Return how far a schedule is from what is allowed, at most 0 where it is allowed."""
        return latency_ms - self.budget_ms * (1 + 2 * ROUNDING)


@dataclass(frozen=True)
class WithinDeviation:
    """The least latency of all schedules that are faithful enough.

    What single layers do is not quite what they do together, so how much damage is allowed is a
    parameter of the search.

    Attributes:
        most: Largest mean score by deviation.
    """

    most: float

    def parameters(self, space: Space) -> tuple[str, ...]:
        """Return the names of the search's parameters."""
        return (*space.parameters(), "damage")

    def proposed(self, space: Space, parameters: Mapping[str, float]) -> Schedule | None:
        """Return the fastest schedule of as much damage as the parameters allow."""
        most = self.most * math.exp(parameters.get("damage", 0.0))
        return space.cheapest(most**POWER, parameters)

    def value(self, latency_ms: float, score: float) -> float:
        """Return what is minimised."""
        return latency_ms

    def excess(self, latency_ms: float, score: float | None) -> float:
        """Return how far a schedule is from what is allowed; 1 before it has run."""
        return 1.0 if score is None else score - self.most


Goal = WithinBudget | WithinDeviation
