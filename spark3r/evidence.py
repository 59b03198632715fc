"""Evidence about one model on one device: exactness, the guard, time, memory and deviation.

`verify_model` is the function behind ``spark3r verify``. It reuses what measures elsewhere: the
timer and the treatments of ``spark3r bench``, and the deviation of ``spark3r run``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from .benchmark.measure import TreatmentResult, measure_side_by_side
from .benchmark.treatments import Apply, treatments
from .clips import Clip
from .errors import PatchError, Spark3rError
from .layout import TokenLayout
from .memory import fits_into_memory
from .patching.apply import apply, remove, replace_attention, verify
from .prediction import Prediction
from .reconstruction import Deviation, deviation
from .reduction.rule import ResolvedRule
from .runner import Runner
from .schedule import Schedule
from .timing import MIN_ROUNDS, Timer

FEW_FRAMES = 4
"""Frames of the passes that show exactness. Every layer runs in them, and they take seconds."""

DENSE = "dense"


@dataclass(frozen=True)
class Evidence:
    """What was found about a model.

    Attributes:
        schedule: Name of the reduced treatment, see `spark3r.benchmark.treatments.ACCEPTED`.
        exactness: Largest difference from the unpatched model relative to an output's largest
            value: ``ones`` with a schedule of factors 1, ``forced`` with every global layer
            computed by the family's code at factors of 1, ``removed`` after removal. 0.0 is the
            same bit for bit.
        guard: Why the guard refuses the model, None if it agrees.
        passes: Of dense and of the schedule, by name: median milliseconds, their interquartile
            range and number, peak memory, and milliseconds by part. One that ran out of memory is
            left out.
        deviation: Deviation of the schedule from dense on the clip; None if it is not defined or
            dense ran out of memory.
        notes: Why a figure is missing.
    """

    schedule: str
    exactness: dict[str, float]
    guard: str | None
    passes: dict[str, dict[str, Any]]
    deviation: dict[str, float | None] | None
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """True if the guard agrees, and the model is the same under factors of 1 and afterwards.

        Layers that are forced through the family's code may round differently on a GPU, where fused
        kernels run. The guard judges them.
        """
        return self.guard is None and self.exactness["ones"] == self.exactness["removed"] == 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the evidence as JSON."""
        return asdict(self)


def verify_model(
    runner: Runner,
    clip: Clip,
    schedule: str,
    *,
    rounds: int = MIN_ROUNDS,
    progress: Callable[[str], None] = lambda message: None,
) -> Evidence:
    """Check a model with a schedule on a clip, and measure both.

    Args:
        runner: An unpatched model; it is so afterwards.
        clip: The clip, as the family's preprocessing makes it.
        schedule: Name of the reduced treatment, see `spark3r.benchmark.treatments.ACCEPTED`.
        rounds: Samples of each latency.
        progress: Callback(message).

    Raises:
        FamilyError: If the family cannot read the model's output.
        PredictionError: If the model returns NaN, or no prediction.
        Spark3rError: If the schedule is unknown or does not fit, or a few frames run out of memory.
    """
    chosen = treatments((DENSE, schedule), runner)
    few = clip.select(slice(0, FEW_FRAMES))
    progress(f"exactness over {few.frames} frames")
    exactness = _exactness(runner, few)
    try:
        verify(runner, few.images)
        refused = None
    except PatchError as error:
        refused = str(error)
    images = clip.images.to(runner.device)
    measured = measure_side_by_side(
        runner, images, chosen, timer=Timer(rounds=rounds), progress=progress
    )
    notes = [f"{name}: out of memory" for name in chosen if name not in measured]
    found = None
    if not notes:
        progress("deviation")
        try:
            found = _deviation(runner, clip, chosen).to_dict()
        except Spark3rError as error:
            notes.append(str(error))
    passes = {name: _figures(each) for name, each in measured.items()}
    return Evidence(schedule, exactness, refused, passes, found, tuple(notes))


def _exactness(runner: Runner, clip: Clip) -> dict[str, float]:
    def forced(module: nn.Module, layout: TokenLayout, *args: Any, **kwargs: Any) -> Tensor:
        return runner.family.reduced_forward(module, layout, ResolvedRule(), *args, **kwargs)

    def under(patch: AbstractContextManager[object]) -> float:
        with patch:
            return _difference(runner.predict(clip), own)

    own = runner.predict(clip)
    ones = Schedule.dense(runner.depth)
    found = {
        "ones": under(apply(runner.model, ones, family=runner.family, guard=False)),
        "forced": under(replace_attention(runner, forced)),
    }
    return found | {"removed": _difference(runner.predict(clip), own)}


def _difference(found: Prediction, own: Prediction) -> float:
    """Return the largest difference of depth, confidence and cameras, relative to their size."""
    names = ("depth", "confidence", "extrinsics", "intrinsics")
    pairs = [(getattr(found, name), getattr(own, name)) for name in names]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


def _deviation(runner: Runner, clip: Clip, chosen: Mapping[str, Apply]) -> Deviation:
    made: list[Prediction] = []
    try:
        for name, put in chosen.items():
            with put():
                if not fits_into_memory(lambda: made.append(runner.predict(clip)), runner.device):
                    raise Spark3rError(f"{name}: out of memory")
    finally:
        remove(runner.model)
    dense, reduced = made
    return deviation(reduced, dense)


def _figures(found: TreatmentResult) -> dict[str, Any]:
    latency = found.latency
    return {
        "ms": latency.median_ms,
        "spread_ms": latency.spread_ms,
        "n": latency.n,
        "peak_mb": found.peak_mb,
        "parts_ms": found.breakdown.ms,
    }
