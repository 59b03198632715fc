"""Measurements from an earlier profile, so that another goal is solved without measuring again."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from spark3r.env import device_name
from spark3r.errors import ProfileError
from spark3r.identity import describe
from spark3r.latency import FORM, LatencyModel
from spark3r.layout import TokenLayout
from spark3r.profile import Profile, compare
from spark3r.profile.evidence import BaselineRun, Measurement, ScheduleRun
from spark3r.runner import dtype_name
from spark3r.schedule import Schedule

from ..clips import Split
from ..settings import Job
from .measurements import Latencies, Sensitivities
from .records import sensitivity_table
from .target_length import clip_of_length
from .timing import LatencyTable, slowdown_from_model


def load_measurements(path: Path, job: Job, split: Split) -> tuple[Latencies, Sensitivities]:
    """Return the measurements of a profile for a job with the same model, device and precision.

    Of the clips only the held-out ones are looked at. They must have the profile's patch grid.

    Raises:
        ProfileError: If the profile was measured on something else, or lacks what is needed.
    """
    profile = Profile.load(path)
    footage = split.held_out[0].images
    measurement = _measurement(path, profile, job, footage)
    table = sensitivity_table(profile.sensitivity, job.settings.objective)
    if table.empty:
        known = ", ".join(sorted({record.metric for record in profile.sensitivity}))
        raise ProfileError(
            f"{path}: has no sensitivities of --objective {job.settings.objective} (only {known}); "
            "calibrate without --from"
        )
    least = profile.schedule().length.min_frames
    shortest = min(clip.frames for clip in split.held_out)
    if shortest < least:
        raise ProfileError(
            f"{path}: holds for clips of at least {least} frames, and a held-out one has "
            f"{shortest}: give as many --frames"
        )
    images = clip_of_length(footage, job.settings.target_frames or measurement.frames)
    layout = job.runner.layout(images)
    short = job.runner.layout(clip_of_length(footage, least))
    return (
        Latencies(images, _latency_table(path, measurement, layout, job.depth), short),
        Sensitivities(table, (), profile.sensitivity),
    )


def _measurement(path: Path, profile: Profile, job: Job, footage: Tensor) -> Measurement:
    """Return the profile's measurement on this device, in this precision, with this grid.

    Raises:
        ProfileError: If there is none, or the profile is of other weights or another revision.
    """
    if not profile.measurements or not profile.sensitivity:
        lacking = "measurements" if not profile.measurements else "sensitivities"
        raise ProfileError(
            f"{path}: has no {lacking} to solve from; calibrate without --from measures them"
        )
    runner = job.runner
    layout, dtype = runner.layout(footage), runner.precision(footage)
    grid = (layout.height, layout.width)
    compared = compare(
        profile,
        describe(runner.family.name, runner.attention, runner.family.metadata(runner.root)),
        name=job.settings.name,
        device=runner.device,
        dtype=dtype,
        grid=grid,
    )
    reasons = (*compared.errors, *compared.warnings)
    if reasons:
        raise ProfileError(
            f"{path}: its measurements do not hold here ({'; '.join(reasons)}); calibrate without "
            "--from"
        )
    here = (device_name(runner.device), dtype_name(dtype), grid)
    fitting = [m for m in profile.measurements if (m.device, m.dtype, m.grid) == here]
    if not fitting:
        raise ProfileError(
            f"{path}: none of its measurements is on {here[0]} in {here[1]} with "
            f"{grid[0]}x{grid[1]} patches at once; calibrate without --from"
        )
    wanted = job.settings.target_frames
    measurement = next((m for m in fitting if m.frames == wanted), fitting[0])
    if measurement.latency_model.form != FORM:
        raise ProfileError(
            f"{path}: its latency model has the form '{measurement.latency_model.form}', expected "
            f"'{FORM}': calibrate without --from"
        )
    return measurement


def _latency_table(
    path: Path, measurement: Measurement, layout: TokenLayout, depth: int
) -> LatencyTable:
    """Return a table of the profile's latency model, without timings of its own.

    Dense latency counts only at the length that it was measured at. It was timed at the end of that
    calibration, when the machine was slower or faster than the latency model, so the slowdown of
    the schedules timed beside it is taken out.
    """
    try:
        model = LatencyModel.from_dict(measurement.latency_model.constants)
    except ValueError as error:
        raise ProfileError(f"{path}: {error}") from error
    dense = measurement.dense.latency if measurement.frames == layout.frames else None
    dense_ms = model.predict_ms(Schedule.dense(depth), layout)
    if dense is not None:
        runs: tuple[ScheduleRun | BaselineRun, ...]
        runs = (*measurement.schedules, *measurement.baselines)
        timed = [
            (each.latency.median_ms, each.predicted_ms) for each in runs if each.latency is not None
        ]
        wall = (measurement.wall.median_ms, model.wall_ms(layout))
        dense_ms = dense.median_ms / slowdown_from_model(timed, wall)
    return LatencyTable(
        layout=layout,
        layers=(),
        passes={},
        model=model,
        report=None,
        largest_error=measurement.latency_model.relative_error,
        dense_ms=dense_ms,
        dense_extrapolated=dense is None,
        wall_ms=model.wall_ms(layout),
    )
