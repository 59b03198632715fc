"""The measurements that a schedule is solved from.

Latencies at the target length, and the sensitivity of every layer. Both are measured here; with
``--from`` both come from an earlier profile, see `.earlier_profile`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pandas as pd
from torch import Tensor

from spark3r.errors import FamilyError
from spark3r.latency import LatencyModel
from spark3r.layout import TokenLayout
from spark3r.profile.evidence import Sensitivity
from spark3r.schedule import Schedule
from spark3r.timing import Latency

from ..budget import time_text
from ..clips import Split
from ..defaults import DENSE_TIMED_S, OPERATORS, TARGET_LENGTHS
from ..settings import Job
from .evaluator import DenseRuns
from .pace import Pace, say_clock, time_at_pace
from .records import sensitivity_records
from .sensitivity import paper_layers, sensitivities
from .target_length import ShortPasses, choose_target_length, clip_of_length
from .timing import Fit, TimedPass, fit_latency, too_long, typical


@dataclass(frozen=True)
class LatencyTable:
    """Latencies at the target length. All are at the pace at which the model was fitted.

    Attributes:
        layout: Token layout of the target length.
        model: The latency model. It is right about the wall at the target length.
        wall: The wall per clip.
        dense: Dense latency per clip; None if it was not timed because it is long, or does not fit.
        dense_ms: Dense latency per clip, predicted where it was not timed.
        dense_fits: False if dense was tried and does not fit into memory.
        fit: The timings that the model was fitted to; None for the model of an earlier profile.
        errors: Measured ÷ predicted latency of what was timed at the target length, by name. The
            predictions are those before the model was corrected.
    """

    layout: TokenLayout
    model: LatencyModel
    wall: Latency
    dense: Latency | None
    dense_ms: float
    dense_fits: bool = True
    fit: Fit | None = None
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def extension(self) -> float:
        """Target length ÷ the length that the model was fitted at."""
        return self.layout.frames / self.model.frames

    @property
    def largest_error(self) -> float:
        """Largest relative error of a schedule's prediction, or that of the wall without one."""
        ratios = [each for name, each in self.errors.items() if name != "wall"]
        return max((abs(1 / ratio - 1) for ratio in ratios or self.errors.values()), default=0.0)

    @property
    def text(self) -> str:
        """The length that the model was fitted at, and its errors at the target, in one line."""
        line = f"latency model: fitted at {self.model.frames} frames"
        if self.extension != 1:
            line += f", extended {self.extension:.1f} times to {self.layout.frames}"
        errors = [f"{name} {each:.3f} of its prediction" for name, each in self.errors.items()]
        return f"{line}; there {', '.join(errors)}" if errors else line


@dataclass(frozen=True)
class Latencies:
    """Latencies at the target length.

    Attributes:
        images: A clip of the target length, ``[S, 3, H, W]``.
        table: The timings and the latency model.
        short: Token layout of the shortest clip that a schedule must fit. It bounds the factors.
        pace: The passes that show the pace of the machine.
    """

    images: Tensor
    table: LatencyTable
    short: TokenLayout
    pace: Pace

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


def measure_latencies(job: Job, split: Split, frames: int, short: ShortPasses) -> Latencies:
    """Fit the latency model at a short length, and time the wall at the target length beside it.

    Dense is timed there as well if the short length lets expect that it takes at most
    `DENSE_TIMED_S`.

    Args:
        job: The job.
        split: Clips by role.
        frames: The target length.
        short: The greatest length at which dense is short.
    """
    footage = split.search[0].images
    images = clip_of_length(footage, frames)
    fitted_images = clip_of_length(footage, min(frames, short.frames))
    at_target: list[TimedPass] = []
    dense_is_short = False
    if frames > short.frames:
        dense_is_short = short.extended(frames)[0] <= 1000 * DENSE_TIMED_S
        at_target = _target_passes(images, dense_is_short)
    fit = fit_latency(
        job.runner,
        fitted_images,
        OPERATORS,
        timer=job.timer,
        limit_s=job.settings.timing_s,
        beside=at_target,
        reporter=job.reporter,
    )
    say_clock(job, "latency of passes", fit.passes["wall"])
    dense = fit.passes.get("dense")
    pace = Pace(
        fitted_images,
        typical(fit.passes["wall"]).median_ms,
        None if dense is None else typical(dense).median_ms,
    )
    if at_target:
        timed = {_TARGET[name]: each for name, each in fit.beside.items()}
        # What does not fit at the short length does not fit here.
        tried = dense_is_short or short.dense_ms is None
        table = _table(job, fit.model, job.runner.layout(images), timed, tried, fit)
    else:
        table = _table(job, fit.model, fit.layout, fit.passes, True, fit)
    for line in split.doubts(frames):
        job.reporter.say(line)
    shortest = min(split.clips, key=lambda clip: clip.frames)
    return Latencies(images, table, job.runner.layout(shortest.images), pace)


def at_binding_length(job: Job, split: Split, latencies: Latencies) -> Latencies:
    """Return latencies at a longer target length if dense meets the budget at the one chosen.

    That was chosen by a few passes, before there was a latency model.

    Args:
        job: A job whose request names no target length.
        split: Clips by role.
        latencies: The latencies at the chosen length.
    """
    budget, table, footage = job.settings.budget, latencies.table, split.search[0].images
    longer = [each for each in TARGET_LENGTHS if each > latencies.frames]
    if budget is None or not longer:
        return latencies
    if table.dense_ms > budget.clip_ms(latencies.frames, table.dense_ms):
        return latencies

    def estimates(frames: int) -> tuple[float, float]:
        layout = job.runner.layout(clip_of_length(footage, frames))
        return _dense_ms(table.model, layout, job.depth), table.model.wall_ms(layout)

    chosen = choose_target_length(budget, estimates, longer)
    job.reporter.say(f"dense meets the budget at {latencies.frames} frames: {chosen.text}")
    images = clip_of_length(footage, chosen.frames)
    extended = extended_table(job, table.model, latencies.pace, images)
    return replace(latencies, images=images, table=replace(extended, fit=table.fit))


def extended_table(job: Job, model: LatencyModel, pace: Pace, images: Tensor) -> LatencyTable:
    """Return the latencies at the target length by an earlier model, where the wall is timed.

    Dense is timed as well if it is predicted to take at most `DENSE_TIMED_S`.

    Args:
        job: The job.
        model: Latency model of another length.
        pace: The passes that show the pace of the machine.
        images: A clip of the target length, ``[S, 3, H, W]``.

    Raises:
        FamilyError: If the wall does not fit into memory.
    """
    layout = job.runner.layout(images)
    dense_is_short = _dense_ms(model, layout, job.depth) <= 1000 * DENSE_TIMED_S
    passes = _target_passes(images, dense_is_short)
    found = time_at_pace(job, pace, model, passes, "latency at the target").latencies
    timed = {_TARGET[name]: each for name, each in found.items()}
    return _table(job, model, layout, timed, dense_is_short, None)


_TARGET = {"wall at the target": "wall", "dense at the target": "dense"}
"""Names of passes at the target length, where others are timed with them."""


def _target_passes(images: Tensor, dense_is_short: bool) -> list[TimedPass]:
    """Return the passes that are timed at the target length: the wall, and dense if short."""
    wall, dense = _TARGET
    passes = [TimedPass(wall, "wall", images)]
    return [*passes, TimedPass(dense, "dense", images, least=1)] if dense_is_short else passes


def _table(
    job: Job,
    model: LatencyModel,
    layout: TokenLayout,
    timed: Mapping[str, Latency],
    dense_tried: bool,
    fit: Fit | None,
) -> LatencyTable:
    if "wall" not in timed:
        raise FamilyError(too_long(layout.frames))
    wall, dense = timed["wall"], timed.get("dense")
    wall_ms = typical(wall).median_ms
    errors: dict[str, float] = {}
    if fit is None or fit.layout != layout:
        errors["wall"] = wall_ms / model.wall_ms(layout)
        model = model.with_wall(layout, wall_ms)
    predicted_ms = _dense_ms(model, layout, job.depth)
    if errors and dense is not None:
        errors["dense"] = dense.median_ms / predicted_ms
    table = LatencyTable(
        layout,
        model,
        wall,
        dense,
        predicted_ms if dense is None else dense.median_ms,
        dense_fits=dense is not None or not dense_tried,
        fit=fit,
        errors=errors,
    )
    job.reporter.say(table.text)
    if not table.dense_fits:
        job.reporter.say(
            f"dense does not fit at {layout.frames} frames: the latency model extrapolates its "
            "latency"
        )
    elif dense is None:
        job.reporter.say(
            f"dense would take about {time_text(predicted_ms)} for {layout.frames} frames, and is "
            "not timed there"
        )
    return table


def _dense_ms(model: LatencyModel, layout: TokenLayout, depth: int) -> float:
    return model.predict_ms(Schedule.dense(depth), layout)


def measure_sensitivities(
    job: Job, split: Split, dense: DenseRuns, short: TokenLayout
) -> Sensitivities:
    """Measure the sensitivity of every layer on the search clips, whose dense runs are given."""
    table = sensitivities(job, dense)
    if not job.settings.trials:  # the paper's schedule is not tried
        return Sensitivities(table, (), sensitivity_records(table, split, job.settings.objective))
    sensitive = paper_layers(job, dense, short)
    job.reporter.say(
        f"sensitive layers by the paper's probe: {', '.join(map(str, sensitive)) or 'none'}"
    )
    records = sensitivity_records(table, split, job.settings.objective)
    return Sensitivities(table, sensitive, records)
