"""The judge: runs schedules on clips and scores them by one source."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean, geometric_mean

import torch
from torch import nn

from spark3r.errors import Spark3rError
from spark3r.families import Family
from spark3r.memory import is_out_of_memory
from spark3r.schedule import Schedule

from .evaluation import DenseRuns, evaluate
from .objective import DEVIATION_WEIGHT, LEAST_DEVIATION, Objective, Source, score
from .quality import Quality


@dataclass(frozen=True)
class Judge:
    """Runs schedules on clips and scores them.

    Attributes:
        model: The model, unpatched between runs.
        family: What is known of it.
        source: What schedules are judged by.
        objective: Which metrics count.
        dtype: Precision of the passes, as `spark3r.inference.run` takes it.
    """

    model: nn.Module
    family: Family
    source: Source
    objective: Objective
    dtype: torch.dtype | None = None

    def qualities(self, schedule: Schedule, dense: DenseRuns) -> tuple[Quality, ...]:
        """Return the quality of a schedule on each clip."""
        return evaluate(self.model, schedule, dense, self.family, dtype=self.dtype)

    def scores(self, qualities: tuple[Quality, ...], dense: DenseRuns) -> dict[str, float]:
        """Return the score of each clip, by its name."""
        return {
            quality.clip: score(quality, reference, self.source, self.objective)
            for quality, reference in zip(qualities, dense.qualities, strict=True)
        }

    def deviations(self, qualities: tuple[Quality, ...], dense: DenseRuns) -> dict[str, float]:
        """Return the score by deviation of each clip, by its name."""
        return replace(self, source="deviation").scores(qualities, dense)

    def search_value(self, qualities: tuple[Quality, ...], dense: DenseRuns) -> tuple[float, float]:
        """Return what a search minimises, and the mean score by the source alone."""
        scores = self.scores(qualities, dense).values()
        mean = fmean(scores)
        if self.source == "deviation":
            # As schedules are compared: a mean of deviations is that of the few hardest clips.
            shifted = geometric_mean(each + LEAST_DEVIATION for each in scores)
            return shifted - LEAST_DEVIATION, mean
        if self.source != "error":
            return mean, mean
        return mean + DEVIATION_WEIGHT * fmean(self.deviations(qualities, dense).values()), mean


def is_failure(error: Exception) -> bool:
    """Whether an error says that a schedule cannot be run: NaN, or out of memory."""
    return isinstance(error, Spark3rError) or is_out_of_memory(error)
