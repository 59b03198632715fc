"""Passes over clips that the ranks of a calibration share; see `calibrate.ranks`.

Every clip belongs to one rank, which runs all passes over it: dense, schedules, and drift. Rank 0
gets qualities and drifts. Predictions of the dense model, to which deviations refer, stay where
they were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from spark3r.clips import Clip
from spark3r.prediction import Prediction
from spark3r.runner import Runner
from spark3r.schedule import Schedule

from ..clips import Split
from ..progress import Progress
from ..ranks import Ranks
from ..settings import Job
from .evaluator import DenseRuns, SplitRuns, run_dense
from .quality import Quality
from .residual_drift import Candidates, DriftSamples, Samples, drift_by_clip

Place = tuple[str, int]
"""Role and number of a clip."""


@dataclass(frozen=True)
class Passes:
    """The passes of a calibration, each on the clips of one rank.

    Attributes:
        runner: The model, unpatched between passes.
        clips: The clips, by role and number, which are the same on all ranks.
        ranks: This rank among the others.
        predictions: Predictions of the dense model on this rank's clips.
    """

    runner: Runner
    clips: Mapping[Place, Clip]
    ranks: Ranks
    predictions: dict[Place, Prediction] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job, split: Split) -> Passes:
        """Return the passes of a job."""
        clips = {
            (role, number): clip
            for role, part in _by_role(split).items()
            for number, clip in enumerate(part)
        }
        return cls(job.runner, clips, job.ranks)

    def run_dense(self, role: str, progress: Progress) -> SharedRuns:
        """Return the dense runs of the clips of a role. For rank 0."""
        places = tuple(place for place in self.clips if place[0] == role)
        clips = tuple(self.clips[place] for place in places)
        progress(0, len(places))
        qualities = self.ranks.call(self.work, "dense", places)
        progress(len(places), len(places))
        return SharedRuns(clips, (), tuple(qualities), passes=self, places=places)

    def work(
        self, name: str, places: Sequence[Place], arguments: tuple[Any, ...]
    ) -> dict[Place, Any]:
        """Run passes on those of the clips that are this rank's, and return the results."""
        own = [place for place in places if self.ranks.owns(place[1])]
        if name == "dense":
            runs = run_dense(self.runner, [self.clips[place] for place in own])
            self.predictions.update(zip(own, runs.predictions, strict=True))
            return dict(zip(own, runs.qualities, strict=True))
        if name == "evaluate":
            schedule, clouds = arguments
            references = tuple(self.predictions[place] for place in own)
            runs = DenseRuns(tuple(self.clips[place] for place in own), references, ())
            qualities = runs.evaluate(self.runner, schedule, clouds=clouds)
            return dict(zip(own, qualities, strict=True))
        (candidates,) = arguments
        drifts = drift_by_clip(self.runner, [self.clips[place] for place in own], candidates)
        return dict(zip(own, drifts, strict=True))


@dataclass(frozen=True)
class SharedRuns(DenseRuns):
    """Dense runs whose predictions lie on the ranks that own the clips. For rank 0.

    Attributes:
        passes: The passes.
        places: Places of the clips there.
    """

    passes: Passes = field(kw_only=True)
    places: tuple[Place, ...] = field(kw_only=True)

    def part(self, begin: int, end: int | None = None) -> SharedRuns:
        """Return the runs of the clips from one number up to another."""
        chosen = slice(begin, end)
        return replace(
            self,
            clips=self.clips[chosen],
            qualities=self.qualities[chosen],
            places=self.places[chosen],
        )

    def evaluate(
        self, runner: Runner, schedule: Schedule, *, clouds: bool = False
    ) -> tuple[Quality, ...]:
        """Return the quality of a schedule on each clip, all of which run on their ranks."""
        ranks = self.passes.ranks
        return tuple(ranks.call(self.passes.work, "evaluate", self.places, schedule, clouds))


def drift_samples(dense: DenseRuns) -> DriftSamples | None:
    """Return the function that measures drift on the ranks of dense runs, None if there is one."""
    if not isinstance(dense, SharedRuns):
        return None

    def samples(candidates: Candidates, progress: Progress) -> Sequence[Samples]:
        progress(0, len(dense.places))
        return dense.passes.ranks.call(dense.passes.work, "drift", dense.places, candidates)

    return samples


def serve(job: Job, split: Split) -> None:
    """Run the passes that rank 0 asks for. For the other ranks."""
    job.ranks.serve(Passes.of(job, split).work)


def run_dense_of(job: Job, split: Split, role: str) -> DenseRuns:
    """Return the dense runs of a role's clips, shared by the ranks of the job."""
    progress = job.reporter.step(f"dense, {role}")
    if job.ranks.size > 1:
        return Passes.of(job, split).run_dense(role, progress)
    return run_dense(job.runner, _by_role(split)[role], progress)


def run_dense_by_role(job: Job, split: Split, search: DenseRuns) -> SplitRuns:
    """Return the dense runs of all clips, of which those of the search are given."""
    validation = run_dense_of(job, split, "validation")
    return SplitRuns(search, validation, run_dense_of(job, split, "held out"))


def _by_role(split: Split) -> dict[str, tuple[Clip, ...]]:
    return {"search": split.search, "validation": split.validation, "held out": split.held_out}
