"""Runs of a model under schedules over the same clips, and their quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, geometric_mean

from spark3r.clips import Clip
from spark3r.errors import Spark3rError
from spark3r.memory import is_out_of_memory
from spark3r.patching.apply import apply, verify
from spark3r.prediction import Prediction
from spark3r.runner import Runner
from spark3r.schedule import Schedule

from ..defaults import Objective, Source
from ..progress import Progress, no_progress
from ..side_by_side import clips_at_once, side_by_side
from .quality import Quality, assess
from .score import DEVIATION_WEIGHT, LEAST_DEVIATION, score


@dataclass(frozen=True)
class DenseRuns:
    """Clips and the runs of the dense model on them.

    Attributes:
        clips: The clips, with different names.
        predictions: Prediction for each clip.
        qualities: Quality of each prediction. All deviations are 0.
    """

    clips: tuple[Clip, ...]
    predictions: tuple[Prediction, ...]
    qualities: tuple[Quality, ...]

    def part(self, begin: int, end: int | None = None) -> DenseRuns:
        """Return the runs of the clips from one number up to another."""
        chosen = slice(begin, end)
        return DenseRuns(self.clips[chosen], self.predictions[chosen], self.qualities[chosen])

    def first(self, count: int) -> DenseRuns:
        """Return the runs of the first ``count`` clips."""
        return self.part(0, count)

    def evaluate(
        self, runner: Runner, schedule: Schedule, *, clouds: bool = False
    ) -> tuple[Quality, ...]:
        """Return the quality of a schedule on each clip; see `evaluate`."""

        def quality(run: tuple[Clip, Prediction]) -> Quality:
            clip, reference = run
            return assess(runner.predict(clip), clip, reference, clouds=clouds)

        runs = list(zip(self.clips, self.predictions, strict=True))
        with apply(runner.model, schedule, family=runner.family, guard=False):
            return tuple(side_by_side(quality, runs, clips_at_once(runner.root)))


@dataclass(frozen=True)
class SplitRuns:
    """Dense runs of all clips, by role.

    Attributes:
        search: Runs of the search clips.
        validation: Runs of the validation clips.
        held_out: Runs of the held-out clips.
    """

    search: DenseRuns
    validation: DenseRuns
    held_out: DenseRuns


def run_dense(runner: Runner, clips: Sequence[Clip], progress: Progress = no_progress) -> DenseRuns:
    """Return the dense runs of an unpatched model on clips, of which there may be none.

    Raises:
        ValueError: If two clips have the same name.
        PredictionError: If the model returns NaN or no prediction.
        PatchError: If the model only looks like one of its family, see `spark3r.apply`.
    """
    names = [clip.name for clip in clips]
    if len(set(names)) < len(names):
        raise ValueError(f"expected clips with different names, got {names}")
    if clips:
        verify(runner, clips[0].images)

    def dense(clip: Clip) -> tuple[Prediction, Quality]:
        prediction = runner.predict(clip)
        return prediction, assess(prediction, clip, prediction)

    runs = side_by_side(dense, clips, clips_at_once(runner.root), progress)
    return DenseRuns(
        tuple(clips), tuple(prediction for prediction, _ in runs), tuple(each for _, each in runs)
    )


def evaluate(
    runner: Runner, schedule: Schedule, dense: DenseRuns, *, clouds: bool = False
) -> tuple[Quality, ...]:
    """Return the quality of a schedule on each clip; the model is unpatched afterwards.

    Args:
        runner: The model.
        schedule: The schedule to apply.
        dense: The clips and their dense runs.
        clouds: Whether to compute accuracy and completeness of the points, default no.

    Raises:
        PredictionError: If the model returns NaN or no prediction.
    """
    return dense.evaluate(runner, schedule, clouds=clouds)


@dataclass(frozen=True)
class Evaluator:
    """Runs schedules on clips and scores them.

    Attributes:
        runner: The model, unpatched between runs.
        source: What schedules are judged by.
        objective: Metrics that count.
    """

    runner: Runner
    source: Source
    objective: Objective

    def qualities(self, schedule: Schedule, dense: DenseRuns) -> tuple[Quality, ...]:
        """Return the quality of a schedule on each clip."""
        return evaluate(self.runner, schedule, dense)

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
        """Return the number that a search minimises, and the mean score by the source alone."""
        scores = self.scores(qualities, dense).values()
        mean = fmean(scores)
        if self.source == "deviation":
            # The geometric mean, as in the paired comparison of schedules. An arithmetic mean is
            # dominated by the hardest clips.
            shifted = geometric_mean(each + LEAST_DEVIATION for each in scores)
            return shifted - LEAST_DEVIATION, mean
        if self.source != "error":
            return mean, mean
        return mean + DEVIATION_WEIGHT * fmean(self.deviations(qualities, dense).values()), mean


def is_failure(error: Exception) -> bool:
    """Return True if an error means that a schedule cannot run: NaN, or out of memory."""
    return isinstance(error, Spark3rError) or is_out_of_memory(error)
