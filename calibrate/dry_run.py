"""The planned work of a calibration, with its estimated time (``--dry-run``)."""

from __future__ import annotations

import time

from spark3r.reduction.rule import ResolvedRule
from spark3r.schedule import Schedule
from spark3r.timing import FIRST_COUNTS_S, samples_to_take

from .budget import time_text
from .clips import Split
from .defaults import (
    FINALISTS_TIMING,
    FRONT_POINTS,
    KNAPSACK_SHARES,
    OPERATORS,
    PROBED_CLIPS,
    TIMED_KEY_VALUE_FACTORS,
    TIMED_QUERY_FACTORS,
    TRADE_OFF_CLIPS,
)
from .measure.evaluator import Evaluator, run_dense
from .measure.sensitivity import probed_of
from .measure.target_length import clip_of_length, dense_and_wall
from .measure.timing import passes_to_time
from .settings import Job
from .verify.selection import KINDS

BASELINES = 4
"""Approximate number of pairs of factors on a frontier of baselines."""

DRIFT_RUNS = 12
"""Approximate time of a pass in which every layer also runs at every factor, in reduced runs. 10
and 16 were measured."""

LAYERS_TIMED = 6
"""Approximate time of all layers of the latency model's fit, in dense layers."""


def plan_lines(job: Job, split: Split, frames: int) -> list[str]:
    """Return the steps of a calibration with their estimated time, a line each.

    The time of quality is estimated from one reduced run on one clip, that of timing from the wall
    and one layer at the target length of ``frames``. Sensitivities that are stored already are not
    taken into account.
    """
    settings, depth = job.settings, job.depth
    few = probed_of(len(split.search))
    knapsacks = 1 + len(KNAPSACK_SHARES)
    frontiers = knapsacks if settings.budget is None else 1
    initial = knapsacks + frontiers * BASELINES * (1 + len(OPERATORS))
    rules = {ResolvedRule(*pair, each) for each in OPERATORS for pair in ((2, 1), (1, 2))}
    probes = depth * len(rules)  # if drift can be trusted
    runs = {
        "dense runs": len(split.clips),
        "drift": DRIFT_RUNS * max(1, len(split.search) - few),
        "sensitivity": probes * few,
        "paper's probe": (depth + 1) * min(PROBED_CLIPS, len(split.search)),
        "search": (initial + settings.trials) * len(split.search),
        "selection": len(KINDS) * len(split.validation),
        "trade-off": FRONT_POINTS * min(TRADE_OFF_CLIPS, len(split.validation)),
        "verification": len(KINDS) * len(split.held_out),
    }
    run_s = _seconds_per_run(job, split)
    images = clip_of_length(split.search[0].images, frames)
    dense_s, wall_s = (ms / 1000 for ms in dense_and_wall(job, images))
    goal_s = dense_s / 2
    if settings.budget is not None:
        goal_s = settings.budget.clip_ms(frames, 1000 * dense_s) / 1000
    fitted, checked = passes_to_time(depth, OPERATORS, TIMED_QUERY_FACTORS, TIMED_KEY_VALUE_FACTORS)
    others = len(fitted) + len(checked) - 2
    timings = {
        "latency of layers": 4 * LAYERS_TIMED * (dense_s - wall_s) / depth,
        "latency of passes": _timed_s([wall_s, dense_s, *[goal_s] * others], settings.timing_s),
        "latency at the goal": _timed_s([wall_s, goal_s], settings.timing_s),
        "latency of finalists": _timed_s(
            [wall_s, dense_s, *[goal_s] * len(KINDS)], FINALISTS_TIMING * settings.timing_s
        ),
    }
    lines = [f"{settings.goal_text}, judged by {job.source}, timed on clips of {frames} frames"]
    lines += [f"{step}: about {time_text(1000 * taken_s)}" for step, taken_s in timings.items()]
    lines += [
        f"{step}: {count} runs of {split.shortest} frames, about {time_text(1000 * run_s * count)}"
        for step, count in runs.items()
    ]
    total_s = sum(timings.values()) + run_s * sum(runs.values())
    return [*lines, f"in all about {time_text(1000 * total_s)}"]


def _timed_s(durations_s: list[float], limit_s: float) -> float:
    by_call = {str(number): taken_s for number, taken_s in enumerate(durations_s)}
    samples = samples_to_take(by_call, limit_s)
    return sum(
        (samples[name] + (taken_s < FIRST_COUNTS_S)) * taken_s for name, taken_s in by_call.items()
    )


def _seconds_per_run(job: Job, split: Split) -> float:
    dense = run_dense(job.runner, split.search[:1])
    schedule = Schedule.uniform(job.depth, 1, 2)
    evaluator = Evaluator(job.runner, job.source, job.settings.objective)
    evaluator.qualities(schedule, dense)  # the first run is slower than the others
    begin = time.perf_counter()
    evaluator.qualities(schedule, dense)
    return time.perf_counter() - begin
