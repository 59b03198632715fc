"""One clip reconstructed: a timed pass, dense or reduced, and its deviation from dense."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .clips import Clip
from .errors import Spark3rError, Spark3rWarning
from .families.base import Family
from .memory import is_out_of_memory, peak_extra_mb
from .metrics import depth_metrics, point_deviation, pose_metrics, scale_drift, umeyama
from .metrics.points import sample_evenly
from .patching.apply import apply
from .prediction import Prediction
from .runner import Runner
from .timing import make_stopwatch

if TYPE_CHECKING:
    from .profile import Profile

Say = Callable[[str], object]

WARM_UP_FRAMES = 2


@dataclass(frozen=True)
class TimedPass:
    """One pass over a clip.

    Attributes:
        prediction: The model's prediction, on the CPU.
        seconds: Duration of the pass alone, after a pass over two frames that warms up.
        peak_mb: Rise of memory above the loaded model and clip, in MB (10⁶ bytes); None where it
            cannot be measured.
    """

    prediction: Prediction
    seconds: float
    peak_mb: float | None


@dataclass(frozen=True)
class Reconstruction:
    """The result of a reconstruction.

    Attributes:
        run: The pass that was asked for.
        dtype: Precision of its matrix products.
        dense: The dense pass, if it was asked for.
        deviation: Deviation of ``run`` from ``dense``, if that was run.
        notes: Warnings of spark3r.
    """

    run: TimedPass
    dtype: torch.dtype
    dense: TimedPass | None = None
    deviation: Deviation | None = None
    notes: tuple[str, ...] = ()


def reconstruct(
    model: nn.Module,
    clip: Clip,
    profile: Profile | None = None,
    *,
    schedule: str | None = None,
    family: Family | str | None = None,
    compare_dense: bool = False,
    dtype: torch.dtype | None = None,
    say: Say = lambda message: None,
) -> Reconstruction:
    """Run a model over a clip, dense or reduced.

    Args:
        model: An unpatched model; it is so afterwards.
        clip: The clip, as the family's preprocessing makes it.
        profile: The profile to apply; None runs dense.
        schedule: Name of one of its schedules; None takes its default.
        family: The model's family or the name of one; None recognises it.
        compare_dense: True runs dense as well, with the family's memory saver.
        dtype: Autocast precision of the pass: ``bfloat16`` or ``float16``; ``float32`` for none, so
            that the precision of the parameters counts; None leaves autocast as it is.
        say: Callback(message), for progress and for warnings of spark3r.

    Raises:
        FamilyError: If the family cannot read the model's output.
        PatchError: If the profile does not fit the model.
        PredictionError: If the model returns NaN, or no prediction.
        Spark3rError: If memory is not enough, or the model does not run in this precision.
    """
    runner = Runner.of(model, family, dtype)
    few = clip.select(slice(0, WARM_UP_FRAMES))
    _timed(runner, few)
    precision = runner.precision(few.images)
    if profile is None:
        say("running dense")
        return Reconstruction(_timed(runner, clip), precision)
    with (
        _notes(say) as notes,
        apply(model, profile, schedule=schedule, family=runner.family) as handle,
    ):
        if all(rule.is_dense for rule in handle.schedule.resolve(clip.frames)):
            notes.append(f"the schedule is dense at {clip.frames} frames: nothing is reduced")
        dense = None
        if compare_dense:
            say("running dense")
            with handle.disabled():
                dense = _timed(runner, clip)
        say("running reduced")
        reduced = _timed(runner, clip)
    compared = None if dense is None else deviation(reduced.prediction, dense.prediction)
    return Reconstruction(reduced, precision, dense, compared, tuple(notes))


def _timed(runner: Runner, clip: Clip) -> TimedPass:
    read = runner.reader
    images = clip.images.to(runner.device)
    outputs: list[Any] = []
    milliseconds: list[float] = []
    stopwatch = make_stopwatch(images.device)

    def call() -> None:
        outputs.append(runner.run(images))

    try:
        with _without_upstream_warnings():
            peak = peak_extra_mb(lambda: milliseconds.append(stopwatch(call)), images.device)
    except Exception as error:
        if is_out_of_memory(error):
            raise Spark3rError(
                f"out of memory at {clip.frames} frames: give fewer frames, or a profile that "
                "reduces more"
            ) from error
        raise
    return TimedPass(read(outputs[0], images).to("cpu"), milliseconds[0] / 1000, peak)


@contextmanager
def _without_upstream_warnings() -> Iterator[None]:
    """Show warnings of spark3r only: a user cannot act on those of the model's code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Spark3rWarning)
        yield


@contextmanager
def _notes(say: Say) -> Iterator[list[str]]:
    """Collect the warnings of spark3r, and say them when the block ends."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Spark3rWarning)
        yield notes
    notes += [str(each.message) for each in caught]
    for note in notes:
        say(f"note: {note}")


_POINTS = 20_000  # pixels, spread evenly over the clip, on which the points' deviation is computed


@dataclass(frozen=True)
class Deviation:
    """Deviation of a reduced pass from the dense pass.

    Attributes:
        depth: Mean |log ratio| of depth after one median scale per clip: .01 is about one percent.
        rotation_deg: Median error of relative rotation over all pairs of frames, degrees.
        translation_deg: Median error of the direction of relative translation over all pairs of
            frames, degrees.
        points: Mean distance of corresponding points over the scene's size after Sim(3) alignment.
        scale_drift: |log| of the change of scale along the clip; None where undefined.
    """

    depth: float
    rotation_deg: float
    translation_deg: float
    points: float
    scale_drift: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Return the figures by name."""
        return asdict(self)


def deviation(reduced: Prediction, dense: Prediction) -> Deviation:
    """Return the deviation of a reduced pass from the dense pass over the same clip.

    Raises:
        Spark3rError: If a figure is undefined, such as with depth that is not positive.
    """
    try:
        source = sample_evenly(reduced.points.reshape(-1, 3), _POINTS)
        target = sample_evenly(dense.points.reshape(-1, 3), _POINTS)
        pose = pose_metrics(reduced.extrinsics, dense.extrinsics)
        return Deviation(
            depth=depth_metrics(reduced.depth, dense.depth, align="clip").log_ratio,
            rotation_deg=pose.rotation_deg,
            translation_deg=pose.translation_deg,
            points=point_deviation(source, target, umeyama(source, target)),
            scale_drift=scale_drift(reduced.extrinsics, dense.extrinsics),
        )
    except ValueError as error:
        raise Spark3rError(f"the runs cannot be compared: {error}") from error
