"""The planned work of a calibration, and how long it will take."""

from __future__ import annotations

import time

from torch import nn

from spark3r.families import detect, unwrap
from spark3r.schedule import Operators, Schedule

from .budget import time_text
from .evaluation import DenseRuns, evaluate, run_dense
from .selection import KINDS
from .settings import (
    KEY_VALUE_FACTORS,
    KNAPSACK_SHARES,
    OPERATORS,
    PROBED_CLIPS,
    QUERY_FACTORS,
    Settings,
)
from .splits import Split

BASELINES = 6
"""About how many pairs of factors a frontier of baselines has."""


def plan_lines(model: nn.Module, split: Split, settings: Settings) -> list[str]:
    """Return what a calibration would do, one line per step, with its estimated time.

    The estimate is the time of one reduced run on one clip, its quality included, times the runs;
    timing at the target length takes what it is allowed.

    Args:
        model: An unpatched model.
        split: Clips by role.
        settings: What is asked for.
    """
    depth = len(detect(model).attention(unwrap(model)))
    few = min(PROBED_CLIPS, len(split.search))
    starts = len(KNAPSACK_SHARES) + BASELINES * (1 + len(OPERATORS))
    probes = depth * (len(QUERY_FACTORS) + len(OPERATORS) * len(KEY_VALUE_FACTORS))
    clips = len(split.search) + len(split.selection) + len(split.held_out)
    runs = {
        "dense runs": clips,
        "sensitivity": probes * few,
        "paper's probe": (depth + 1) * few,
        "search": (starts + settings.trials) * len(split.search),
        "selection": len(KINDS) * len(split.selection),
        "verification": len(KINDS) * len(split.held_out),
    }
    run_s = _seconds_per_run(model, run_dense(model, split.search[:1]))
    lines = [f"timing at the target length: about {time_text(4000 * settings.timing_s)} or more"]
    lines += [
        f"{step}: {count} runs of {split.shortest} frames, about {time_text(1000 * run_s * count)}"
        for step, count in runs.items()
    ]
    total_s = run_s * sum(runs.values()) + 4 * settings.timing_s
    return [*lines, f"in all about {time_text(1000 * total_s)}"]


def _seconds_per_run(model: nn.Module, dense: DenseRuns) -> float:
    depth = len(detect(model).attention(unwrap(model)))
    schedule = Schedule.uniform(depth, 1, 2, operators=Operators())
    evaluate(model, schedule, dense)  # the first run is slower than the others
    begin = time.perf_counter()
    evaluate(model, schedule, dense)
    return time.perf_counter() - begin
