"""The sections of a profile that hold its evidence: measurements and sensitivities."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from .model import Count, Factor, Factors, Name, OperatorsRecord, Section

Milliseconds = Annotated[float, Field(gt=0)]
FigureTable = Annotated[dict[str, float], Field(min_length=1)]


def _existing(date: str) -> str:
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise ValueError("a date such as 2026-01-31") from None
    return date


# Text, because pydantic also reads seconds since 1970 as a date.
Day = Annotated[str, Field(pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}$"), AfterValidator(_existing)]


class Timing(Section):
    """A latency.

    Attributes:
        median_ms: Median of the samples.
        spread_ms: Their interquartile range.
        n: Number of samples.
    """

    median_ms: Milliseconds
    spread_ms: Annotated[float, Field(ge=0)]
    n: Count


class LatencyModelRecord(Section):
    """The latency of a schedule from its realised lengths.

    Attributes:
        form: Name of the formula the constants belong to.
        constants: Its constants, by name.
        relative_error: Largest relative error on the whole-model runs it was checked on.
    """

    form: Name
    constants: FigureTable
    relative_error: Annotated[float, Field(ge=0)]


Role = Literal["calibration", "selection", "held_out"]


class ClipRecord(Section):
    """A clip that figures were taken on.

    Attributes:
        name: What figures refer to it by.
        digest: Hash of its frames as 8-bit images.
        frames: Number of frames.
        role: Whether the search saw it (``calibration``), the choice between its best schedules was
            made on it (``selection``), or neither (``held_out``).
    """

    name: Name
    digest: Annotated[str, Field(pattern="^[0-9a-f]{16,64}$")]
    frames: Count
    role: Role


class Figures(Section):
    """Quality on one clip, each source a table of figures by name, or null when not known.

    Attributes:
        clip: Name of the clip.
        deviation: Distance to the dense outputs.
        error: Distance to ground truth.
        consistency: Disagreement of the run with itself.
    """

    clip: Name
    deviation: FigureTable | None = None
    error: FigureTable | None = None
    consistency: FigureTable | None = None


class Run(Section):
    """What one way of running the model took and gave.

    Attributes:
        latency: Per clip of the measurement's length, or null where it is only predicted.
        peak_memory_bytes: Peak of allocated memory, or null when the device cannot tell.
        figures: Quality per clip.
    """

    latency: Timing | None
    peak_memory_bytes: Count | None = None
    figures: tuple[Figures, ...] = ()


class ScheduleRun(Run):
    """A run of one of the profile's schedules.

    Attributes:
        schedule: Its name.
        predicted_ms: What the latency model says.
        budget_ms: What it was allowed to take, or null when nobody set a budget.
    """

    schedule: Name
    predicted_ms: Milliseconds
    budget_ms: Milliseconds | None = None


class BaselineRun(Run):
    """A run of the uniform or the paper schedule that is as fast as one of the profile's.

    Attributes:
        baseline: Which of the two.
        against: Name of the profile's schedule it is compared with.
        predicted_ms: What the latency model says.
        operators: Its operators.
        factors: Query and key-value factor of every global layer.
    """

    baseline: Literal["uniform", "paper"]
    against: Name
    predicted_ms: Milliseconds
    operators: OperatorsRecord
    factors: Annotated[tuple[Factors, ...], Field(min_length=1)]


class EnvironmentRecord(Section):
    """Where a measurement was taken: the record of ``python -m spark3r.env``."""

    spark3r: Name
    python: Name
    os: Name
    packages: dict[str, Name]
    cpu: Name
    cores: Count
    threads: Count
    gpus: tuple[Name, ...]
    driver: Name | None
    cuda: Name | None
    sdpa_backends: tuple[Name, ...]
    matmul_precision: Name


class Measurement(Section):
    """Evidence from one device, dtype, attention backend, clip length and grid.

    Attributes:
        device: Name of the GPU, or of the CPU.
        dtype: Precision of the pass, such as ``bfloat16``.
        attention_backend: Backend of scaled dot-product attention that was used.
        frames: Length of the clips timed.
        grid: Rows and columns of patches per frame.
        latency_model: Predicts the latency of any schedule here.
        dense: The unpatched model.
        wall: Latency when global attention returns zeros.
        schedules: The profile's schedules.
        baselines: Uniform and paper schedules at the same latency.
        clips: The clips that figures refer to.
        environment: Where it was measured.
        seed: Seed of everything random.
        date: Day of the measurement, UTC.
    """

    device: Name
    dtype: Name
    attention_backend: Name
    frames: Count
    grid: tuple[Count, Count]
    latency_model: LatencyModelRecord
    dense: Run
    wall: Timing
    schedules: Annotated[tuple[ScheduleRun, ...], Field(min_length=1)]
    baselines: tuple[BaselineRun, ...] = ()
    clips: tuple[ClipRecord, ...] = ()
    environment: EnvironmentRecord
    seed: Annotated[int, Field(ge=0)]
    date: Day


class Sensitivity(Section):
    """How much a figure grows when one layer alone is reduced.

    Attributes:
        axis: Which factor was changed.
        profiler: ``probe``: end to end; ``drift``: residual drift of the layer, scaled.
        metric: The figure, such as ``deviation.depth``.
        clips: Names of the clips.
        frames: Their length.
        operators: Operators of the reduced layer.
        operating_point: Query and key-value factor of all layers around which it was probed.
        factors: Factors tried.
        values: Means over clips, one row per global layer, one value per factor; null where not
            measured.
        spreads: Standard deviations over clips of the paired differences from the operating point,
            in the same form; empty when not known.
    """

    axis: Literal["query", "key_value"]
    profiler: Literal["probe", "drift"]
    metric: Name
    clips: Annotated[tuple[Name, ...], Field(min_length=1)]
    frames: Count
    operators: OperatorsRecord
    operating_point: Factors
    factors: Annotated[tuple[Factor, ...], Field(min_length=1)]
    values: Annotated[tuple[tuple[float | None, ...], ...], Field(min_length=1)]
    spreads: tuple[tuple[float | None, ...], ...] = ()
