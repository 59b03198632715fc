"""The sections of a profile that hold its evidence: measurements and sensitivities."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from .model import Count, ExecutionRecord, Factor, Factors, Name, OperatorsRecord, Section

Milliseconds = Annotated[float, Field(gt=0)]
FigureTable = Annotated[dict[str, float], Field(min_length=1)]
Role = Literal["search", "validation", "held_out"]


def _existing(date: str) -> str:
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise ValueError("a date such as 2026-01-31") from None
    return date


# Text, because pydantic also reads seconds since 1970 as a date.
Day = Annotated[str, Field(pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}$"), AfterValidator(_existing)]


class Timing(Section):
    """A measured latency."""

    median_ms: Milliseconds
    """Median of the samples, in ms per clip."""
    spread_ms: Annotated[float, Field(ge=0)]
    """Interquartile range of the samples, in ms."""
    n: Count
    """Number of samples."""


class LatencyModelRecord(Section):
    """The formula that predicts the latency of a schedule from its realised lengths."""

    form: Name
    """Name of the formula that the constants belong to."""
    constants: FigureTable
    """Constants of the formula, by name."""
    relative_error: Annotated[float, Field(ge=0)]
    """Largest relative error on the whole-model runs that the formula was checked on."""
    fitted_frames: tuple[Count, ...] = ()
    """Lengths in frames of the clips that the constants were fitted to. Empty when not recorded."""
    extended_to: Count | None = None
    """Longest clip in frames that the formula is extended to. Null: no length beyond the fitted."""
    target_error: float | None = None
    """Measured ÷ predicted latency − 1 of the default schedule at the measurement's length. Null
    when it was not measured there."""


class ClipRecord(Section):
    """A clip that figures were taken on."""

    name: Name
    """Name that figures refer to. A rendered clip is named by the version of its generator and its
    seed, as in `rendered:v2:7`; `rendered:7` is of the first version."""
    digest: Annotated[str, Field(pattern="^[0-9a-f]{16,64}$")]
    """Hash of the frames as 8-bit images, in 16 to 64 lower-case hex digits."""
    frames: Count
    """Number of frames."""
    role: Role
    """Use of the clip. `search`: the search saw it. `validation`: the choice among the best
    schedules of the search was made on it. `held_out`: neither."""
    masked: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the patches that a mask took out of the keys and values."""


class Figures(Section):
    """Quality on one clip: a table of figures by name for each source."""

    clip: Name
    """Name of the clip."""
    deviation: FigureTable | None = None
    """Distances to the dense outputs. Null when not known."""
    error: FigureTable | None = None
    """Distances to ground truth. Null when not known."""
    consistency: FigureTable | None = None
    """Disagreements among the outputs of the run. Null when not known."""


class Run(Section):
    """Latency, memory and quality of one way to run the model."""

    latency: Timing | None
    """Latency of a clip of the measurement's length. Null when it is only predicted."""
    peak_memory_bytes: Count | None = None
    """Peak of allocated memory, in bytes. Null when the device cannot tell."""
    figures: tuple[Figures, ...] = ()
    """Quality on each clip."""


class ScheduleRun(Run):
    """A run of one of the profile's schedules."""

    schedule: Name
    """Name of the schedule."""
    predicted_ms: Milliseconds
    """Latency by the latency model, in ms per clip."""
    budget_ms: Milliseconds | None = None
    """Latency that was allowed, in ms per clip. Null when there was no budget."""


class BaselineRun(Run):
    """A run of a uniform or paper schedule that is as fast as one of the profile's schedules."""

    baseline: Literal["uniform", "paper"]
    """Kind of schedule. `uniform`: the same factors in all layers. `paper`: those of Spark3R,
    scaled."""
    against: Name
    """Name of the profile's schedule that it is compared with."""
    predicted_ms: Milliseconds
    """Latency by the latency model, in ms per clip."""
    operators: OperatorsRecord
    """Operators of all layers."""
    factors: Annotated[tuple[Factors, ...], Field(min_length=1)]
    """Query and key-value factor of each global layer."""


class RefusedKernel(Section):
    """An implementation that was tried and not used."""

    implementation: Name
    """Name of the implementation."""
    reason: Name
    """Why it was refused: the error that it raised, or the difference from the plain result."""


class KernelRecord(Section):
    """The implementation that computed one operation of a pass."""

    operation: Name
    """What is computed, such as `attention`, `attention with mass correction` or `matching`."""
    implementation: Name
    """What computes it: a backend of scaled dot-product attention, `triton` or `plain`."""
    refused: tuple[RefusedKernel, ...] = ()
    """Implementations that come first in order of preference and were refused."""


class EnvironmentRecord(Section):
    """The machine and software of a measurement, as `python -m spark3r.env` prints them."""

    spark3r: Name
    """Version of spark3r."""
    python: Name
    """Version of Python."""
    os: Name
    """Operating system, its release and the machine type."""
    packages: dict[str, Name]
    """Versions of the installed packages that matter, by name."""
    cpu: Name
    """Name of the processor."""
    cores: Count
    """Number of logical cores."""
    threads: Count
    """Number of threads that torch uses."""
    gpus: tuple[Name, ...]
    """Names of the GPUs."""
    driver: Name | None
    """Version of the GPU driver. Null without one."""
    cuda: Name | None
    """Version of CUDA that torch was built for. Null without it."""
    sdpa_backends: tuple[Name, ...]
    """Backends of scaled dot-product attention that are enabled."""
    matmul_precision: Name
    """Precision of float32 matrix products in torch."""


class Measurement(Section):
    """Evidence from one device, precision, clip length and grid."""

    device: Name
    """Name of the GPU, or of the CPU."""
    dtype: Name
    """Precision of the pass, such as `bfloat16`."""
    kernels: Annotated[tuple[KernelRecord, ...], Field(min_length=1)]
    """Implementations that ran, one entry per operation."""
    execution: ExecutionRecord = ExecutionRecord()
    """Choices beyond attention that all runs have in common, the dense one included."""
    frames: Count
    """Length of the timed clips."""
    grid: tuple[Count, Count]
    """Rows and columns of patches per frame."""
    latency_model: LatencyModelRecord
    """Model that predicts the latency of any schedule on this device."""
    dense: Run
    """Run of the unpatched model."""
    wall: Timing
    """Latency of a pass whose global attention returns zeros."""
    schedules: Annotated[tuple[ScheduleRun, ...], Field(min_length=1)]
    """Runs of the profile's schedules."""
    baselines: tuple[BaselineRun, ...] = ()
    """Runs of uniform and paper schedules at the same latency."""
    clips: tuple[ClipRecord, ...] = ()
    """Clips that the figures refer to."""
    environment: EnvironmentRecord
    """Machine and software."""
    seed: Annotated[int, Field(ge=0)]
    """Seed of sampling and search."""
    date: Day
    """Day of the measurement in UTC, such as 2026-01-31."""


class Sensitivity(Section):
    """How much a figure grows when one layer alone is reduced."""

    axis: Literal["query", "key_value"]
    """Axis whose factor was changed."""
    profiler: Literal["probe", "drift"]
    """Method. `probe`: the figure itself, end to end. `drift`: the residual drift of the layer,
    scaled."""
    metric: Name
    """Name of the figure, such as `deviation.depth`, or of a score, such as `score.error`."""
    clips: Annotated[tuple[Name, ...], Field(min_length=1)]
    """Names of the clips."""
    frames: Count
    """Length of the clips."""
    operators: OperatorsRecord
    """Operators of the reduced layer."""
    operating_point: Factors
    """Query and key-value factor of all other layers."""
    factors: Annotated[tuple[Factor, ...], Field(min_length=1)]
    """Factors that were tried."""
    values: Annotated[tuple[tuple[float | None, ...], ...], Field(min_length=1)]
    """Means over clips: one row per global layer, one value per factor. Null where not measured."""
    spreads: tuple[tuple[float | None, ...], ...] = ()
    """Standard deviations over clips of the paired differences from the operating point, in the
    same form. Empty when not known."""
