"""Measurements from an earlier profile, so that another goal is solved without measuring again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from spark3r.env import device_name
from spark3r.errors import FamilyError, ProfileError
from spark3r.identity import describe
from spark3r.latency import FORM, LatencyModel
from spark3r.profile import Profile, compare
from spark3r.profile.evidence import Measurement
from spark3r.runner import Runner, dtype_name
from spark3r.schedule import Schedule
from spark3r.timing import Latency

from ..clips import Split
from ..defaults import FITTED_STEP, PACE_S, SAME_PACE
from ..settings import Job
from .measurements import Latencies, LatencyTable, Sensitivities, extended_table
from .pace import Pace, say_clock
from .records import sensitivity_table
from .target_length import clip_of_length
from .timing import TimedPass, time_passes, too_long, typical


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
    model = _latency_model(path, measurement)
    images = clip_of_length(footage, job.settings.target_frames or measurement.frames)
    now, pace = _at_present_pace(job, model, footage, images.shape[0])
    if images.shape[0] == measurement.frames:
        latencies = _scaled_table(job, measurement, model, now, images)
    else:
        latencies = extended_table(job, now, pace, images)
    return (
        Latencies(images, latencies, job.runner.layout(clip_of_length(footage, least)), pace),
        Sensitivities(table, (), profile.sensitivity),
    )


def require_holds_here(
    path: Path,
    profile: Profile,
    runner: Runner,
    name: str | None,
    dtype: torch.dtype | None = None,
    grid: tuple[int, int] | None = None,
) -> None:
    """Raise if the measurements of a profile do not hold for a model on its device.

    Args:
        path: File of the profile.
        profile: The profile.
        runner: The model.
        name: Name of the model for ``--model``; None when unknown.
        dtype: Precision of its passes; None when unknown.
        grid: Rows and columns of patches per frame; None when unknown.

    Raises:
        ProfileError: With every reason, or if the profile has no measurements.
    """
    if not profile.measurements or not profile.sensitivity:
        lacking = "measurements" if not profile.measurements else "sensitivities"
        raise ProfileError(
            f"{path}: has no {lacking} to solve from; calibrate without --from measures them"
        )
    compared = compare(
        profile,
        describe(runner.family.name, runner.attention, runner.family.metadata(runner.root)),
        name=name,
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


def _scaled_table(
    job: Job, measurement: Measurement, before: LatencyModel, now: LatencyModel, images: Tensor
) -> LatencyTable:
    """Return the latencies of a profile at the present pace; neither dense nor the wall is timed.

    The profile's dense latency counts if it was taken at the pace of the latency model. It was not
    in profiles of earlier versions, whose wall then differs from the model's.

    Args:
        job: The job.
        measurement: Measurement of the profile, at the length of the images.
        before: Its latency model.
        now: The same model at the present pace.
        images: A clip of the target length, ``[S, 3, H, W]``.
    """
    layout = job.runner.layout(images)
    wall_ms, stored = now.wall_ms(layout), measurement.dense.latency
    dense_ms = now.predict_ms(Schedule.dense(job.depth), layout)
    dense = None
    if stored is not None:
        same_pace = measurement.wall.median_ms / before.wall_ms(layout)
        if abs(same_pace - 1) <= SAME_PACE:
            dense = Latency((stored.median_ms * wall_ms / before.wall_ms(layout),))
            dense_ms = dense.median_ms
    return LatencyTable(layout, now, Latency((wall_ms,)), dense, dense_ms)


def _at_present_pace(
    job: Job, model: LatencyModel, footage: Tensor, at_most: int
) -> tuple[LatencyModel, Pace]:
    """Return the model at the present pace of the machine, and the passes that show it.

    Their length is the greatest at which dense takes at most `PACE_S`, but not longer than the
    target.
    """
    dense = Schedule.dense(job.depth)
    lengths = range(min(FITTED_STEP, at_most), at_most + 1, FITTED_STEP)

    def dense_ms(frames: int) -> float:
        return model.predict_ms(dense, job.runner.layout(clip_of_length(footage, frames)))

    frames = max((n for n in lengths if dense_ms(n) <= 1000 * PACE_S), default=lengths[0])
    images = clip_of_length(footage, frames)
    timed = time_passes(
        job.runner,
        [TimedPass("wall", "wall", images), TimedPass("dense", "dense", images)],
        timer=job.timer,
        limit_s=4 * PACE_S,
        progress=job.reporter.step("present pace"),
    )
    if not timed.keys() >= {"wall", "dense"}:
        raise FamilyError(too_long(frames))
    wall, now = timed["wall"], timed["dense"]
    say_clock(job, "present pace", now)
    slowdown = now.median_ms / dense_ms(frames)
    job.reporter.say(
        f"the machine takes {slowdown:.2f} times as long as when the profile was made, and its "
        "latency model is scaled by that"
    )
    # Later timings of the same two passes are compared with these, never with a prediction.
    return model.scaled(slowdown), Pace(images, typical(wall).median_ms, typical(now).median_ms)


def _measurement(path: Path, profile: Profile, job: Job, footage: Tensor) -> Measurement:
    """Return the profile's measurement on this device, in this precision, with this grid.

    Raises:
        ProfileError: If there is none, or the profile is of other weights or another revision.
    """
    runner = job.runner
    layout, dtype = runner.layout(footage), runner.precision(footage)
    grid = (layout.height, layout.width)
    require_holds_here(path, profile, runner, job.settings.name, dtype, grid)
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


def _latency_model(path: Path, measurement: Measurement) -> LatencyModel:
    try:
        return LatencyModel.from_dict(measurement.latency_model.constants)
    except ValueError as error:
        raise ProfileError(f"{path}: {error}") from error
