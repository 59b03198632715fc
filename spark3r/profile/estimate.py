"""What a schedule takes at a length: as its profile measured it, or by the profile's latency model.

Nothing here is known from elsewhere. What a profile cannot tell is a `ProfileError` that says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ProfileError
from ..latency import FORM, LatencyModel
from ..layout import TokenLayout
from ..schedule import Schedule
from .document import Profile
from .evidence import Measurement, ScheduleRun

FARTHEST = 10
"""Largest multiple of the fitted length at which the latency model is asked."""

LEAST_SPEED_UP = 1.1
"""A schedule that is less than this many times as fast as dense gains little."""

MOST_TOKENS = 20_000_000
"""Longest sequence whose merge plans are counted."""


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a clip under a schedule.

    Attributes:
        measured: True if the times were measured at this length, False if they are predicted.
        seconds: Seconds per clip under the schedule.
        dense_seconds: Seconds of the dense model.
        device: Device of the measurement.
        dtype: Precision of the measurement.
        date: Day of the measurement.
        measured_frames: Length of the measurement in frames.
        relative_error: Largest error of the latency model on the passes that it was checked on.
        fitted_frames: Lengths that the latency model was fitted to.
        known_to: Longest clip that the latency model is fitted or extended to.
        peak_gb: Peak memory under the schedule at the measurement's length, in GB (10⁹ bytes). None
            if the profile has none.
        dense_peak_gb: The same of the dense model.
    """

    measured: bool
    seconds: float
    dense_seconds: float
    device: str
    dtype: str
    date: str
    measured_frames: int
    relative_error: float
    fitted_frames: tuple[int, ...]
    known_to: int
    peak_gb: float | None
    dense_peak_gb: float | None

    @property
    def speed_up(self) -> float:
        """How many times as fast as dense the whole pass is."""
        return self.dense_seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON values."""
        return asdict(self) | {"speed_up": self.speed_up}


def estimate(profile: Profile, schedule: str, layout: TokenLayout) -> Estimate:
    """Return time and memory of a clip under one of a profile's schedules.

    Args:
        profile: The profile.
        schedule: Name of the schedule.
        layout: Token layout of the clip.

    Raises:
        ProfileError: If the profile does not tell.
    """
    measurement, run = _nearest(profile, schedule, layout)
    fitted = measurement.latency_model.fitted_frames or (measurement.frames,)
    at_length = layout.frames == measurement.frames
    if at_length and run.latency is not None and measurement.dense.latency is not None:
        seconds = run.latency.median_ms / 1e3
        dense_seconds = measurement.dense.latency.median_ms / 1e3
        measured = True
    else:
        seconds, dense_seconds = _predicted(profile, schedule, measurement, layout, max(fitted))
        measured = False
    return Estimate(
        measured=measured,
        seconds=seconds,
        dense_seconds=dense_seconds,
        device=measurement.device,
        dtype=measurement.dtype,
        date=measurement.date,
        measured_frames=measurement.frames,
        relative_error=measurement.latency_model.relative_error,
        fitted_frames=fitted,
        known_to=max(*fitted, measurement.latency_model.extended_to or 1),
        peak_gb=_gigabytes(run.peak_memory_bytes),
        dense_peak_gb=_gigabytes(measurement.dense.peak_memory_bytes),
    )


def little_gain(profile: Profile, schedule: str) -> str | None:
    """Return in words that a schedule is hardly faster than dense wherever it was measured.

    Args:
        profile: The profile.
        schedule: Name of the schedule.

    Returns:
        The warning; None if it gains `LEAST_SPEED_UP`, reduces nothing, or has no evidence.
    """
    wanted = profile.schedule(schedule)
    if wanted.length.mode == "constant" and all(rule.is_dense for rule in wanted.layers):
        return None
    special = profile.model.special_tokens or 0
    gains: dict[int, float] = {}
    for measurement in profile.measurements:
        layout = TokenLayout(measurement.frames, *measurement.grid, special)
        try:
            gain = estimate(profile, schedule, layout).speed_up
        except ProfileError:
            continue
        gains[layout.frames] = max(gain, gains.get(layout.frames, 0.0))
    if not gains or max(gains.values()) >= LEAST_SPEED_UP:
        return None
    shown = ", ".join(f"at {frames} frames {gain:.2f} times" for frames, gain in gains.items())
    return (
        f"schedule '{schedule}' gains little where it was measured: it is {shown} as fast as the "
        "dense model. Attention has a larger share of longer clips, which gain more; run short "
        "ones dense, or calibrate for a lower budget"
    )


def _nearest(
    profile: Profile, schedule: str, layout: TokenLayout
) -> tuple[Measurement, ScheduleRun]:
    """Return the measurement of a schedule on a layout's grid whose length is nearest."""
    runs = [
        (measurement, run)
        for measurement in profile.measurements
        for run in measurement.schedules
        if run.schedule == schedule
    ]
    if not runs:
        raise ProfileError(
            "the profile has no measurement of this schedule; `calibrate` measures your model on "
            "your device"
        )
    grid = (layout.height, layout.width)
    on_grid = [(each, run) for each, run in runs if each.grid == grid]
    if not on_grid:
        raise ProfileError(
            f"the profile is measured on {_grids([each for each, _ in runs])} patches a frame only"
        )
    return min(on_grid, key=lambda pair: abs(pair[0].frames - layout.frames))


def _grids(measurements: Sequence[Measurement]) -> str:
    return ", ".join(dict.fromkeys(f"{m.grid[0]}x{m.grid[1]}" for m in measurements))


def _predicted(
    profile: Profile, schedule: str, measurement: Measurement, layout: TokenLayout, fitted: int
) -> tuple[float, float]:
    """Return the seconds of a schedule and of the dense model by the latency model."""
    record = measurement.latency_model
    if record.form != FORM:
        raise ProfileError(f"its latency model has the form '{record.form}', expected '{FORM}'")
    if profile.model.special_tokens is None:
        raise ProfileError("the profile does not tell how many special tokens a frame has")
    if layout.frames > FARTHEST * max(fitted, record.extended_to or 1):
        raise ProfileError(
            f"{layout.frames} frames are more than {FARTHEST} times the {fitted} that its latency "
            "model was fitted to"
        )
    if layout.tokens > MOST_TOKENS:
        raise ProfileError(f"{layout.tokens} tokens are too many to count their merging")
    try:
        model = LatencyModel.from_dict(record.constants)
    except ValueError as error:
        raise ProfileError(f"its latency model cannot be used: {error}") from error
    dense = Schedule.dense(len(profile.model.global_layers))
    seconds, dense_seconds = (
        model.predict_ms(each, layout) / 1e3 for each in (profile.schedule(schedule), dense)
    )
    if not 0 < seconds < float("inf") or not 0 < dense_seconds < float("inf"):
        raise ProfileError("its latency model gives no time")
    return seconds, dense_seconds


def _gigabytes(count: int | None) -> float | None:
    return None if count is None else count / 1e9
