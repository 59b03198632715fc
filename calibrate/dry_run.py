"""The planned work of a calibration (``--dry-run``), without loading or measuring anything.

Nothing here needs torch, because a plan is printed within two seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spark3r.timing import VERY_LONG_S, samples_to_take

from .budget import Budget, time_text
from .defaults import (
    DENSE_MARGIN,
    DENSE_TIMED_S,
    EFFORTS,
    FITTED_S,
    FITTED_STEP,
    FRAMES,
    LEAST_SAMPLES,
    OPERATORS,
    TARGET_LENGTHS,
    TIMING_S,
    WALL_MARGIN,
    Effort,
    Source,
)
from .plan import ClipCounts, Work

FIT_S = 25.0
"""Approximate time of the fit of the latency model."""

LAYERS_TIMED = 6
"""Approximate time of all layers of the latency model's fit, in dense layers."""

OTHER_PASSES = 1 + len(OPERATORS)
"""Passes that the latency model is fitted to, besides the wall and dense."""

DEPTHS = {
    "reference": 8,
    "vggt": 24,
    "omega": 19,
    "pi3": 18,
    "da3": 14,
    "mapanything": 8,
    "worldmirror": 24,
    "panovggt": 18,
}
"""Global layers of the models that have a name, the largest of each kind."""

UNKNOWN_DEPTH = 24
"""Global layers that a model of the user's own is assumed to have."""

# The reference model at its default size on two quiet CPU cores, see the README.
MACHINE = "the reference model on two quiet CPU cores"
RUN_S, RENDERING_S = 0.21, 0.175
"""Seconds of a reduced run of `FRAMES` frames with its figures, and of rendering such a clip."""
FRAME_S, SQUARE_S = 0.0044, 1.15e-4
"""Seconds of a dense pass by frame, which is the wall, and by the square of the frames."""


def clip_counts(sources: int, held_out: int, effort: Effort = "normal") -> ClipCounts:
    """Return how many clips of each role ``--clip`` and ``--held-out`` give, if footage is long.

    Args:
        sources: Number of pieces of footage to calibrate on; 0 takes rendered scenes.
        held_out: Number of pieces for the report only.
        effort: How much work the calibration takes.
    """
    amounts = EFFORTS[effort]
    if not sources and not held_out:
        return ClipCounts(*amounts[:3])
    sources = sources or amounts.search_clips + amounts.validation_clips
    roles = 3 if held_out else 4
    stretches = max(math.ceil(amounts.stretches / sources), roles if sources < roles else 1)
    dealt = [0] * roles
    for source in range(sources):
        for part in range(stretches):
            dealt[source % roles if sources >= roles else part * roles // stretches] += 1
    return ClipCounts(dealt[0] + dealt[1], dealt[2], held_out or dealt[3])


@dataclass(frozen=True)
class Request:
    """What is planned: the options of a calibration, as far as its work depends on them.

    Attributes:
        budget: Largest latency; None where a deviation is the limit.
        goal_text: The budget or deviation as on the command line.
        clips: Number of clips by role.
        source: What schedules are judged by.
        model: Name of the model, as ``--model`` takes it.
        frames: Frames of each clip, default `FRAMES`.
        target_frames: Length in frames that the budget must hold for; None chooses one.
        trials: Trials of the search beyond those of the initial schedules.
        is_known: Whether the durations of `MACHINE` hold for this model, device and size.
    """

    budget: Budget | None
    goal_text: str
    clips: ClipCounts
    source: Source
    model: str
    frames: int
    target_frames: int | None
    trials: int
    is_known: bool


def plan_lines(request: Request) -> list[str]:
    """Return the planned steps of a calibration, a line each.

    The durations of the reference model on a CPU are estimated. For others the lines count runs and
    passes. Sensitivities that are stored already are not taken into account.
    """
    budget = request.budget
    if budget is not None and (
        (budget.kind == "share" and budget.value >= 1)
        or (budget.kind == "speed_up" and budget.value <= 1)
    ):
        return [_meets(request, "dense")]
    frames = request.target_frames
    if request.is_known:
        frames = frames or _target_frames(budget)
        if budget is not None and not _wall_s(frames) < _clip_s(budget, frames) < _dense_s(frames):
            return [_pointless(request, budget, frames)]
    lengths = str(frames) if frames else f"{TARGET_LENGTHS[0]} to {TARGET_LENGTHS[-1]}"
    lines = [f"{request.goal_text}, judged by {request.source}, timed on clips of {lengths} frames"]
    runs = _work(request).runs()
    total = sum(runs.values())
    if not request.is_known or frames is None:
        kind = request.model.partition(":")[0]
        assumed = "" if kind in DEPTHS else f", if the model has {UNKNOWN_DEPTH} global layers"
        return [
            *lines,
            *(f"{step}: {count} runs of {request.frames} frames" for step, count in runs.items()),
            f"latency: fitted on clips whose dense pass takes {FITTED_S:g} s, about "
            f"{time_text(1000 * FIT_S)}; at the target length the wall twice, and the answer three "
            "times",
            f"in all {total} runs{assumed}, at 1 s each about {_minutes_text(total)}",
            "nothing was loaded or measured: this is a rough plan",
        ]
    run_s = RUN_S * request.frames / FRAMES
    timings = _timings_s(frames, budget)
    rendering_s = RENDERING_S * request.frames / FRAMES * sum(request.clips)
    lines += [f"rendering: {sum(request.clips)} clips, about {time_text(1000 * rendering_s)}"]
    lines += [f"{step}: about {time_text(1000 * taken_s)}" for step, taken_s in timings.items()]
    lines += [
        f"{step}: {count} runs of {request.frames} frames, about {time_text(1000 * run_s * count)}"
        for step, count in runs.items()
    ]
    total_s = rendering_s + sum(timings.values()) + run_s * total
    return [
        *lines,
        f"in all about {time_text(1000 * total_s)} for {MACHINE}",
        "nothing was loaded or measured: this is a rough plan",
    ]


def _work(request: Request) -> Work:
    depth = DEPTHS.get(request.model.partition(":")[0], UNKNOWN_DEPTH)
    return Work(request.clips, request.trials, depth, within_deviation=request.budget is None)


def _dense_s(frames: int) -> float:
    return FRAME_S * frames + SQUARE_S * frames**2


def _wall_s(frames: int) -> float:
    return FRAME_S * frames


def _clip_s(budget: Budget, frames: int) -> float:
    return budget.clip_ms(frames, 1000 * _dense_s(frames)) / 1000


def _target_frames(budget: Budget | None) -> int:
    """Return the target length by the estimated durations, the longest if none has both margins."""
    if budget is None:
        return TARGET_LENGTHS[0]
    for frames in TARGET_LENGTHS:
        clip_s = _clip_s(budget, frames)
        if _dense_s(frames) >= DENSE_MARGIN * clip_s and clip_s >= WALL_MARGIN * _wall_s(frames):
            return frames
    return TARGET_LENGTHS[-1]


def _pointless(request: Request, budget: Budget, frames: int) -> str:
    dense, wall = time_text(1000 * _dense_s(frames)), time_text(1000 * _wall_s(frames))
    estimate = f": {MACHINE} takes about {dense} for {frames} frames, and {wall} at the wall"
    if _clip_s(budget, frames) >= _dense_s(frames):
        return _meets(request, "dense probably", estimate)
    return (
        f"{request.goal_text} can probably not be reached, and then nothing is searched{estimate}. "
        "The calibration times it, and names the smallest budget that can be reached"
    )


def _meets(request: Request, dense: str, estimate: str = "") -> str:
    return (
        f"{request.goal_text}: {dense} meets it as it is, and then nothing is searched: the "
        f"calibration times the model, and exports the dense schedule{estimate}"
    )


def _timings_s(frames: int, budget: Budget | None) -> Mapping[str, float]:
    """Return the seconds of each step that times the model, by the estimated durations."""
    lengths = range(FITTED_STEP, frames + 1, FITTED_STEP)
    fitted = max((n for n in lengths if _dense_s(n) <= FITTED_S), default=FITTED_STEP)
    short_s, short_wall_s = _dense_s(fitted), _wall_s(fitted)
    wall_s, dense_s = _wall_s(frames), _dense_s(frames)
    goal_s = dense_s / 2 if budget is None else _clip_s(budget, frames)
    reduced = [(short_s + short_wall_s) / 2] * OTHER_PASSES
    passes = [short_wall_s, short_s, *reduced]
    if fitted < frames:
        passes += [wall_s, *([dense_s / LEAST_SAMPLES] if dense_s <= DENSE_TIMED_S else [])]
    pace_s = LEAST_SAMPLES * (short_s + short_wall_s)
    return {
        "length to time": 2 * (short_s + short_wall_s),
        "latency of layers": 4 * LAYERS_TIMED * (short_s - short_wall_s) / DEPTHS["reference"],
        "latency of passes": _timed_s(passes),
        "latency at the goal": pace_s + goal_s,
        "latency of the answer": pace_s + goal_s * (1 if goal_s >= VERY_LONG_S else LEAST_SAMPLES),
    }


def _timed_s(durations_s: Sequence[float]) -> float:
    by_call = {str(number): taken_s for number, taken_s in enumerate(durations_s)}
    samples = samples_to_take(by_call, TIMING_S, least=LEAST_SAMPLES)
    return sum(samples[name] * taken_s for name, taken_s in by_call.items())


def _minutes_text(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))} min"
