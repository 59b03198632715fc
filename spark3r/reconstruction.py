"""One clip reconstructed: a timed pass, dense or reduced, and its deviation from dense."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .clips import Clip
from .errors import Spark3rError, Spark3rWarning
from .families.base import Family
from .fitting import Plan
from .identity import name_of
from .memory import is_out_of_memory, peak_extra_mb
from .metrics import depth_metrics, point_deviation, pose_metrics, scale_drift, umeyama
from .metrics.points import sample_evenly
from .patching.apply import apply
from .patching.handle import Handle
from .prediction import Prediction
from .ranks import collect
from .runner import Runner, dtype_name
from .schedule import Schedule
from .timing import make_stopwatch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .layout import TokenLayout
    from .profile import Profile
    from .profile.expectation import Expectation

Cameras = tuple[Tensor, Tensor]
"""Known extrinsics ``[S, 3, 4]`` and intrinsics ``[S, 3, 3]``."""

Say = Callable[[str], object]

Stage = Callable[[str, Collection[nn.Module]], AbstractContextManager[object]]
"""``stage(name, modules)`` is entered around each stage of a job, and told the global attention
modules that run in it, in the order of a pass; there are none where no whole pass runs."""

WARM_UP_FRAMES = 2


def no_stage(name: str, modules: Collection[nn.Module]) -> AbstractContextManager[object]:
    """Watch nothing."""
    return nullcontext()


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
        expected: Deviation that the profile measured of the schedule, if ``deviation`` is known and
            the profile measured it.
        notes: Warnings of spark3r.
    """

    run: TimedPass
    dtype: torch.dtype
    dense: TimedPass | None = None
    deviation: Deviation | None = None
    expected: Expectation | None = None
    notes: tuple[str, ...] = ()


def reconstruct(
    model: nn.Module,
    clip: Clip,
    profile: Profile | None = None,
    *,
    schedule: str | None = None,
    family: Family | str | None = None,
    compare_dense: bool = False,
    mask: Tensor | None = None,
    cameras: Cameras | None = None,
    dtype: torch.dtype | None = None,
    plan: Plan | None = None,
    say: Say = lambda message: None,
    stage: Stage = no_stage,
    group: ProcessGroup | None = None,
) -> Reconstruction:
    """Run a model over a clip, dense or reduced.

    Args:
        model: An unpatched model; it is so afterwards.
        clip: The clip, as the family's preprocessing makes it.
        profile: The profile to apply; None runs dense.
        schedule: Name of one of its schedules; None takes its default.
        family: The model's family or the name of one; None recognises it.
        compare_dense: True runs dense as well, with the family's memory saver.
        mask: ``[S, H, W]`` bool, False where a pixel is masked in dense and reduced passes, see
            `Handle.masking`; None masks nothing.
        cameras: Known extrinsics ``[S, 3, 4]`` and intrinsics ``[S, 3, 3]``, see `Runner.run`.
        dtype: Autocast precision of the pass: ``bfloat16`` or ``float16``; ``float32`` for none, so
            that the precision of the parameters counts; None leaves autocast as it is.
        plan: What `spark3r.fit` returned for the same model, clip, profile and precision; the pass
            runs by it, with its schedule.
        say: Callback(message), for warnings of spark3r.
        stage: Context manager of each stage, for progress and logs: ``warm-up``, ``dense``,
            ``reduced`` and ``compare``.
        group: Process group of ranks that share the clip; None if this process is alone. Each
            rank's clip then has its own frames, see `spark3r.Handle.share`. Rank 0 returns the
            prediction of the whole clip and its deviation, the others that of their frames.

    Raises:
        FamilyError: If the family cannot read the model's output, or takes no cameras.
        LayoutError: If the mask does not fit, or the model was moved and still holds positions on
            another device.
        PatchError: If the profile does not fit the model.
        PredictionError: If the model returns NaN, or no prediction.
        Spark3rError: If memory is not enough, the model does not run in this precision, or its
            parameters have no values.
    """
    runner = Runner.of(model, family, dtype)
    few = clip.select(slice(0, WARM_UP_FRAMES))
    layers = runner.attention.values()
    with stage("warm-up", layers):
        with _within_memory(few):
            layout, precision = runner.layout(few.images), runner.precision(few.images)
        begin = None if cameras is None else (cameras[0][: few.frames], cameras[1][: few.frames])
        _timed(runner, few, begin)
    if profile is None:
        planned: AbstractContextManager[None] = nullcontext()
        if plan is not None:  # a masked pass has a schedule applied already
            masks = mask is not None
            planned = plan.running(model) if masks else plan.applied(model, family=runner.family)
        with planned, stage("dense", layers):
            return Reconstruction(_dense(runner, clip, group, mask, cameras), precision)
    dense = compared = expected = None
    if plan is not None:
        schedule = plan.schedule_name
    if compare_dense and not (group is None and mask is None):
        with stage("dense", layers):
            dense = _dense(runner, clip, group, mask, cameras, _COMPARED)
    with (
        _notes(say) as notes,
        apply(model, profile, schedule=schedule, family=runner.family, group=group) as handle,
        nullcontext() if plan is None else plan.running(model),
    ):
        if compare_dense:
            expected = _expected(profile, schedule, layout, precision)
        if compare_dense and dense is None:
            with stage("dense", layers), handle.disabled():
                dense = _timed(runner, clip, cameras, _COMPARED)
        with stage("reduced", layers), _masked(handle, mask):
            reduced = _timed(runner, clip, cameras, group=group)
        frames = reduced.prediction.frames  # of all ranks
        if all(rule.is_dense for rule in handle.schedule.resolve(frames)):
            notes.append(f"the schedule is dense at {frames} frames: nothing is reduced")
        if dense is not None and (group is None or group.rank() == 0):
            try:
                with stage("compare", ()):
                    compared = deviation(reduced.prediction, dense.prediction)
            except Spark3rError as error:  # the passes are done, and their results are kept
                notes.append(str(error))
        if compared is not None and expected is not None:
            notes += _beyond(compared, expected, runner)
    return Reconstruction(reduced, precision, dense, compared, expected, tuple(notes))


def _expected(
    profile: Profile, schedule: str | None, layout: TokenLayout, precision: torch.dtype
) -> Expectation | None:
    from .profile.expectation import expected_deviation

    grid = (layout.height, layout.width)
    return expected_deviation(profile, schedule, grid=grid, dtype=dtype_name(precision))


def _beyond(found: Deviation, expected: Expectation, runner: Runner) -> Iterator[str]:
    """Yield a warning if deviations are beyond the evidence, with every such figure."""
    from .profile.compatibility import calibrate_line

    beyond = {
        name: (value, figure.mean)
        for name, value in found.to_dict().items()
        if value is not None
        and (figure := expected.figures.get(name)) is not None
        and figure.is_exceeded(value)
    }
    if not beyond:
        return
    times = {name: f"{value / max(mean, 1e-9):.2g} times" for name, (value, mean) in beyond.items()}
    (name, (value, mean)), *others = beyond.items()
    also = ", ".join(f"{LABELS[other]} {times[other]}" for other, _ in others)
    yield (
        f"{LABELS[name]} deviates {in_unit(name, value)} from dense, {times[name]} the "
        f"{in_unit(name, mean)} that the profile measured on {expected}"
        + (f" ({also})" if also else "")
        + f"; {calibrate_line(runner.family.name, name_of(runner.root), own_clip=True)} measures a "
        "profile for footage like this"
    )


_COMPARED = "the dense pass to compare with ran "


def _dense(
    runner: Runner,
    clip: Clip,
    group: ProcessGroup | None,
    mask: Tensor | None,
    cameras: Cameras | None,
    what: str = "",
) -> TimedPass:
    """Return a dense pass of an unpatched model, masked, or of a clip that ranks share."""
    if group is None and mask is None:
        return _timed(runner, clip, cameras, what)
    schedule = Schedule.dense(runner.depth)
    with (
        apply(runner.model, schedule, family=runner.family, group=group) as handle,
        _masked(handle, mask),
    ):
        return _timed(runner, clip, cameras, what, group)


def _masked(handle: Handle, mask: Tensor | None) -> AbstractContextManager[None]:
    return nullcontext() if mask is None else handle.masking(mask)


def _timed(
    runner: Runner,
    clip: Clip,
    cameras: Cameras | None = None,
    what: str = "",
    group: ProcessGroup | None = None,
) -> TimedPass:
    read = runner.reader
    images = clip.images.to(runner.device)
    outputs: list[Any] = []
    milliseconds: list[float] = []
    stopwatch = make_stopwatch(images.device)

    def call() -> None:
        outputs.append(runner.run(images, cameras))

    with _within_memory(clip, what):
        peak = peak_extra_mb(lambda: milliseconds.append(stopwatch(call)), images.device)
    prediction = read(outputs[0], images).to("cpu")
    if group is not None:
        names = [each.name for each in fields(prediction)]
        prediction = Prediction(*collect([getattr(prediction, name) for name in names], group))
    return TimedPass(prediction, milliseconds[0] / 1000, peak)


@contextmanager
def _within_memory(clip: Clip, what: str = "") -> Iterator[None]:
    """Name what ran out of memory, and show warnings of spark3r only.

    A user cannot act on warnings of the model's code.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Spark3rWarning)
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            remedy = "leave it out, or give" if what else "give"
            raise Spark3rError(
                f"{what}out of memory at {clip.frames} frames: {remedy} fewer frames, or a profile "
                "that reduces more"
            ) from error


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

    def above(self, percent: float) -> list[str]:
        """Return in words which figures are above a limit.

        Args:
            percent: The limit. One percent is a hundredth of depth, points and scale drift, 1° of
                rotation and 4° of the direction of translation, as `ONE_PERCENT` says.
        """
        return [
            f"{LABELS[name]} {in_unit(name, value)} is above {in_unit(name, limit)}"
            for name, value in self.to_dict().items()
            if value is not None and not value <= (limit := percent * ONE_PERCENT[name])
        ]


LABELS: Mapping[str, str] = MappingProxyType(
    {
        "depth": "depth",
        "rotation_deg": "rotation",
        "translation_deg": "translation direction",
        "points": "points",
        "scale_drift": "scale drift",
    }
)
"""Names of the deviations in messages."""

ONE_PERCENT: Mapping[str, float] = MappingProxyType(
    {
        "depth": 0.01,
        "rotation_deg": 1.0,
        "translation_deg": 4.0,
        "points": 0.01,
        "scale_drift": 0.01,
    }
)
"""What counts as a deviation of one percent, here and in ``calibrate --max-deviation``."""


def in_unit(name: str, value: float) -> str:
    """Return a deviation with its unit: ``3.45°`` of an angle, and else ``5.96%``."""
    return f"{value:.3g}°" if name.endswith("_deg") else f"{100 * value:.3g}%"


def deviation(reduced: Prediction, dense: Prediction) -> Deviation:
    """Return the deviation of a reduced pass from the dense pass over the same clip.

    Raises:
        Spark3rError: If a figure is undefined, such as with depth that is not positive.
    """
    try:
        source = sample_evenly(reduced.points.reshape(-1, 3), _POINTS)
        target = sample_evenly(dense.points.reshape(-1, 3), _POINTS)
        pose = pose_metrics(reduced.extrinsics, dense.extrinsics)
        found = Deviation(
            depth=depth_metrics(reduced.depth, dense.depth, align="clip").log_ratio,
            rotation_deg=pose.rotation_deg,
            translation_deg=pose.translation_deg,
            points=point_deviation(source, target, umeyama(source, target)),
            scale_drift=scale_drift(reduced.extrinsics, dense.extrinsics),
        )
    except ValueError as error:
        raise Spark3rError(f"the runs cannot be compared: {error}") from error
    for name, value in found.to_dict().items():
        if value is not None and not math.isfinite(value):
            raise Spark3rError(f"the runs cannot be compared: {LABELS[name]} deviates by {value}")
    return found
