"""One clip reconstructed: a timed pass, dense or reduced, and how far it is from dense."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .clips import Clip
from .errors import FamilyError, Spark3rError, Spark3rWarning
from .families.base import Family
from .families.registry import detect
from .memory import is_out_of_memory, peak_extra_mb
from .metrics import depth_metrics, point_deviation, pose_metrics, scale_drift, umeyama
from .metrics.points import sample_evenly
from .patching.patch import apply
from .prediction import Prediction
from .runner import device_of, precision_of, run
from .timing import make_stopwatch

if TYPE_CHECKING:
    from .profile import Profile

Say = Callable[[str], object]

WARM_UP_FRAMES = 2


@dataclass(frozen=True)
class Run:
    """One pass over a clip.

    Attributes:
        prediction: What the model says, on the CPU.
        seconds: Of the pass alone, after a pass over two frames that warms up.
        peak_mb: How far memory rose above the loaded model and clip, in MB (10⁶ bytes); None
            where it cannot be measured.
    """

    prediction: Prediction
    seconds: float
    peak_mb: float | None


@dataclass(frozen=True)
class Reconstruction:
    """What came out of a clip.

    Attributes:
        run: The pass that was asked for.
        dtype: Precision that it ran in.
        dense: The dense pass beside it, where it was asked for.
        deviation: How far the run is from dense, where that was run.
        notes: What spark3r warned of.
    """

    run: Run
    dtype: torch.dtype
    dense: Run | None = None
    deviation: Deviation | None = None
    notes: tuple[str, ...] = ()


def reconstruct(
    model: nn.Module,
    clip: Clip,
    profile: Profile | None = None,
    *,
    schedule: str | None = None,
    family: Family | None = None,
    compare_dense: bool = False,
    dtype: torch.dtype = torch.float32,
    say: Say = lambda message: None,
) -> Reconstruction:
    """Run a model over a clip, dense or reduced.

    Args:
        model: An unpatched model; it is so afterwards.
        clip: The clip, as the family's preprocessing makes it.
        profile: What to apply; None runs dense.
        schedule: Which of its schedules; None takes its default.
        family: What is known of the model; None recognises it.
        compare_dense: Whether to run dense as well, with the family's memory saver.
        dtype: Precision of the pass by autocast, ``float32`` for none: then it is that of the
            parameters.
        say: Told what is being done, and what spark3r warns of.

    Raises:
        FamilyError: The family cannot read the model's output.
        PatchError: The profile does not fit the model.
        PredictionError: The model returns NaN, or no prediction.
        Spark3rError: Memory does not suffice, or the model does not run in this precision.
    """
    family = detect(model) if family is None else family
    timed = partial(_timed, model, family=family, dtype=dtype)
    few = clip.select(slice(0, WARM_UP_FRAMES))
    timed(few)
    running = precision_of(model, few.images, family, dtype)
    if profile is None:
        say("running dense")
        return Reconstruction(timed(clip), running)
    with _notes(say) as notes, apply(model, profile, schedule=schedule, family=family) as handle:
        if all(rule.is_dense for rule in handle.schedule.resolve(clip.frames)):
            notes.append(f"the schedule is dense at {clip.frames} frames: nothing is reduced")
        dense = None
        if compare_dense:
            say("running dense")
            with handle.disabled():
                dense = timed(clip)
        say("running reduced")
        reduced = timed(clip)
    compared = None if dense is None else deviation(reduced.prediction, dense.prediction)
    return Reconstruction(reduced, running, dense, compared, tuple(notes))


def _timed(model: nn.Module, clip: Clip, family: Family, dtype: torch.dtype) -> Run:
    if family.predict is None:
        raise FamilyError(f"family '{family.name}' cannot read the model's output")
    images = clip.images.to(device_of(model))
    outputs: list[Any] = []
    milliseconds: list[float] = []
    stopwatch = make_stopwatch(images.device)

    def call() -> None:
        outputs.append(run(model, images, family, dtype))

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
    return Run(family.predict(outputs[0], images).to("cpu"), milliseconds[0] / 1000, peak)


@contextmanager
def _without_upstream_warnings() -> Iterator[None]:
    """Let spark3r's warnings pass, and none of the model's own, which the user cannot mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Spark3rWarning)
        yield


@contextmanager
def _notes(say: Say) -> Iterator[list[str]]:
    """Collect what spark3r warns of, and say it when the block ends."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Spark3rWarning)
        yield notes
    notes += [str(each.message) for each in caught]
    for note in notes:
        say(f"note: {note}")


_POINTS = 20_000  # pixels that the figure of points is taken from, spread evenly over the clip


@dataclass(frozen=True)
class Deviation:
    """Distance of a run from the dense run.

    Attributes:
        depth: Mean |log ratio| of depth after one median scale per clip: .01 is about one percent.
        rotation_deg: Median relative rotation over all pairs of frames, degrees.
        translation_deg: Median direction of relative translation over the same, degrees.
        points: Mean distance of corresponding points over the scene's size after Sim(3) alignment.
        scale_drift: |log| of how much the scale changes along the clip; None where undefined.
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
    """Return how far a reduced run is from the dense run of the same clip.

    Raises:
        Spark3rError: A figure is undefined, such as with depth that is not positive.
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
