"""The measurements that a schedule is solved from.

Latencies at the target length, and the sensitivity of every layer. Both are measured here; with
``--from`` both come from an earlier profile, see `.earlier_profile`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from torch import Tensor

from spark3r.layout import TokenLayout
from spark3r.profile.evidence import Sensitivity

from ..clips import Split
from ..defaults import BUSY, OPERATORS
from ..settings import Job
from .evaluator import DenseRuns
from .records import sensitivity_records
from .sensitivity import paper_layers, sensitivities
from .target_length import clip_of_length
from .timing import LatencyTable, measure_latency, relative_spread


@dataclass(frozen=True)
class Latencies:
    """Latencies at the target length.

    Attributes:
        images: A clip of the target length, ``[S, 3, H, W]``.
        table: The timings and the latency model.
        short: Token layout of the shortest clip that a schedule must fit. It bounds the factors.
    """

    images: Tensor
    table: LatencyTable
    short: TokenLayout

    @property
    def frames(self) -> int:
        """The target length in frames."""
        return self.table.layout.frames


@dataclass(frozen=True)
class Sensitivities:
    """How sensitive every layer is.

    Attributes:
        table: Sensitivities around the dense model; see `calibrate.measure.probe`.
        sensitive: Layers that are sensitive by the paper's rule. They are empty where the paper's
            probe did not run, so that its schedule is not among the baselines.
        records: All of it as a profile stores it.
    """

    table: pd.DataFrame
    sensitive: tuple[int, ...]
    records: tuple[Sensitivity, ...]


def measure_latencies(job: Job, split: Split, frames: int) -> Latencies:
    """Time the model at the target length, and tell the user how far the result can be trusted."""
    images = clip_of_length(split.search[0].images, frames)
    table = measure_latency(
        job.runner,
        images,
        OPERATORS,
        timer=job.timer,
        limit_s=job.settings.timing_s,
        reporter=job.reporter,
    )
    say = job.reporter.say
    say(str(table.report))
    spread = relative_spread(table.passes)
    if spread > BUSY:
        say(
            f"timings of the same pass differ by {spread:.0%}: the machine is busy, and the "
            "results will hold only roughly"
        )
    if table.dense_extrapolated:
        say(f"dense does not fit at {frames} frames: the latency model extrapolates its latency")
    for line in split.doubts(frames):
        say(line)
    shortest = min(split.clips, key=lambda clip: clip.frames)
    return Latencies(images, table, job.runner.layout(shortest.images))


def measure_sensitivities(
    job: Job, split: Split, dense: DenseRuns, short: TokenLayout
) -> Sensitivities:
    """Measure the sensitivity of every layer on the search clips, whose dense runs are given."""
    table = sensitivities(job, dense)
    sensitive = paper_layers(job, dense, short)
    job.reporter.say(
        f"sensitive layers by the paper's probe: {', '.join(map(str, sensitive)) or 'none'}"
    )
    records = sensitivity_records(table, split, job.settings.objective)
    return Sensitivities(table, sensitive, records)
