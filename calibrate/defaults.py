"""The numbers and choices of a calibration that a user may ask about. Nothing here needs torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from spark3r.reduction.operators import Operators, QueryMerging, TokenStride
from spark3r.timing import Timer

Objective = Literal["balanced", "depth", "pose", "points"]
"""Metrics that count."""

Source = Literal["error", "consistency", "deviation"]
"""What schedules are judged by."""

SOURCES: tuple[Source, ...] = ("error", "consistency", "deviation")
"""All sources, the one closest to the truth first."""

# Clips

FRAMES = 24
"""Default of ``--frames``: frames of the clips that quality is measured on."""

SEARCH_CLIPS, VALIDATION_CLIPS, HELD_OUT_CLIPS = 6, 16, 12
"""Rendered clips of each role by default. A few suffice to search, because the result is selected
and reported on others."""

FROM_HELD_OUT_CLIPS = 6
"""Rendered held-out clips with ``--from``."""

STRETCHES = 16
"""Consecutive stretches that a few pieces of footage are cut into. A quarter of them are validation
clips, and fewer could hardly tell schedules apart."""

LEAST_FRAMES = 2
"""Fewest frames of a clip: a single frame has no pose to judge."""

FEW_TO_VALIDATE = 4
"""Number of validation clips below which a message says that they hardly tell schedules apart."""

MOST_HELD_OUT = 200
"""Most held-out clips. A profile holds their figures under every schedule, and a file of more could
not be read again (`spark3r.profile.files.MAX_VALUES`)."""

FAR_TARGET = 4
"""Ratio of the target length to the clips' length above which a message says that the clips are
short. At a ratio of 10 short clips choose schedules that deviate half as much again at the target,
at 4 a sixth more (docs/method/sensitivity.md)."""

# Target length

TARGET_LENGTHS = (128, 256, 512, 1024)
"""Lengths that the default target length is chosen from, in frames."""

DENSE_MARGIN = 1.5
"""Least ratio of dense latency to the budget at the default target length."""

WALL_MARGIN = 1.1
"""Least ratio of the budget to the wall at the default target length."""

# Operators and factors

OPERATORS = (
    Operators(),
    Operators(QueryMerging(unmerge="linear"), TokenStride(keep_anchor=True, mass_correction=1.0)),
)
"""Operators that a layer chooses from: the paper's, and the ones most faithful to dense."""

QUERY_FACTORS = (2, 3, 4, 6, 8)
KEY_VALUE_FACTORS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
"""Factors at which drift is measured, besides factor 1."""

OFFERED = (1, *KEY_VALUE_FACTORS)
"""Factors that a layer chooses from on each axis, besides the measured ones, up to the largest
measured factor of the axis."""

# Latency

TIMING_S = 4.0
"""Approximate seconds of each timing step."""

TIMER = Timer(cpu_clock=time.thread_time)
"""The timer of a calibration."""

FITTED_S = 1.5
"""Longest dense pass that the latency model is fitted to. Longer clips are extended to."""

FITTED_STEP = 8
"""Lengths that the latency model may be fitted at are multiples of this many frames."""

FITTED_FROM = 1.25
"""Ratio of two lengths below which a longer one is not looked for."""

FITTED_GROWTH = 4
"""Largest ratio of a length that is tried for the fit to the one before."""

PACE_S = 1.0
"""Longest dense pass that shows the present pace of the machine to the model of a profile."""

DENSE_TIMED_S = 4.0
"""Longest dense pass that is timed at the target length. It is timed once."""

TYPICAL_SAMPLES = 3
"""Samples of the short passes that the latency model is fitted to, and that show the pace."""

LEAST_SAMPLES = 2
"""Samples of each whole pass at the target length that are taken whatever the time limit. The
budget is judged by as many of the exported schedule."""

SAME_PACE = 0.08
"""Relative change of a pass up to which the pace of the machine counts as the same. On a machine
whose cores are shared, the median of three short passes differs as much from one minute to the
next."""

CORRECT_BELOW = 0.92
"""Share of the budget below which the timed answer of the knapsack corrects the latency model."""

TIMED_QUERY_FACTORS = (1, 2, 3, 4, 8)
TIMED_KEY_VALUE_FACTORS = (1, 2, 4, 8, 16, 32, 64)
"""Factors of the layers that the latency model is fitted to."""

# Sensitivity

SCALE_PROBE_FACTOR = 4
"""Factor of both axes at which every layer is probed. The ratio of these probes to drift scales the
drift of all factors."""

PROBED_CLIPS = 2
"""Search clips that are probed. Drift is measured on the others."""


def probed_of(clips: int) -> int:
    """Return the number of search clips that are probed: half of them where there are few."""
    return min(PROBED_CLIPS, max(1, clips // 2))


TRUSTED = 0.6
"""Least rank correlation of drift with the probes of a calibration for drift to stand in for them.
Over all factors drift reaches 0.8 and more (`benchmarks/profilers.py`). A calibration compares a
single factor on a few clips, where even probes rank like those of other clips at 0.86, in one draw
of ten below 0.72."""

PROBED_QUERY_FACTORS = (2, 4, 8)
PROBED_KEY_VALUE_FACTORS = (2, 4, 8, 16, 32)
"""Factors that are probed where drift cannot be trusted. A probe costs a whole run."""

PAPER_POINT, PAPER_RAISE = 32, 8
"""The paper's probe: all layers at this key-value factor, one layer at eight times that. Both are
brought down to short clips."""

# Search

TRIALS = 8
"""Default of ``--trials``: trials of the search beyond those of the initial schedules."""

POWER = 2.0
"""Power to which degradations are added up. 2 takes them for independent."""

KNAPSACK_SHARES = (0.64, 0.8, 1.25, 1.6)
"""Other goals that the knapsack also solves for. With a budget, a share of 0.8 means a goal at 80 %
of the way from the wall to the budget. With a deviation it means 80 % of that deviation."""

AIM = 0.98
"""Share of a budget that the search aims at. The latency of a schedule varies by some percent from
pass to pass, and most passes should keep to the budget."""

LOG_WEIGHT = 1.5
"""Bound of the search's parameters: weights lie between e^-1.5 and e^1.5, a factor of twenty."""

RANDOM_TRIALS = 5
"""Finished trials before the sampler uses its model."""

# Selection and correction

KINDS = ("uniform", "paper", "knapsack", "search")
"""Kinds of schedules, the simplest first. A trial's name begins with its kind."""

SLACK = 0.08
"""Share of the budget that may be left unused."""

OVER = 0.02
"""Share of the budget by which the median of two or more timings may exceed it."""

RETRIES = 2
"""Most schedules that are tried after the first one has missed the budget."""

FASTER = 0.98
"""Largest latency of a schedule, as a share of a simpler one's, for which the faster one is
preferred where a deviation is the limit."""

ATTEMPTS = 3
"""Most trials of a kind that run on the validation clips until one is allowed there as well."""

REPEATED_PROPOSALS = 3
"""Best proposals of the search that are solved again after a correction."""

# Report

FRONT_POINTS = 4
"""Schedules of the trade-off that are exported beside the chosen one."""

TRADE_OFF_CLIPS = 4
"""Validation clips that those schedules run on. Nothing is decided by them."""

APART = 1.06
"""Least ratio of latencies between points of the trade-off."""

ALLOWED = 1.05
"""Measured ÷ allowed deviation up to which the goal counts as met on the held-out clips."""

# Effort

Effort = Literal["quick", "normal", "thorough"]
"""How much work a calibration takes."""


class Amounts(NamedTuple):
    """What an effort means.

    Attributes:
        search_clips: Rendered clips to search on.
        validation_clips: Rendered clips that decide which schedule is exported.
        held_out_clips: Rendered clips for the report.
        stretches: Stretches that a few pieces of footage are cut into.
        trials: Trials of the search beyond those of the initial schedules; 0 searches nothing, and
            the knapsack's answer to the sensitivities is exported.
        timing_s: Approximate seconds of each timing step.
    """

    search_clips: int
    validation_clips: int
    held_out_clips: int
    stretches: int
    trials: int
    timing_s: float


EFFORTS: Mapping[Effort, Amounts] = MappingProxyType(
    {
        "quick": Amounts(4, 0, 8, 8, 0, 3.0),
        "normal": Amounts(
            SEARCH_CLIPS, VALIDATION_CLIPS, HELD_OUT_CLIPS, STRETCHES, TRIALS, TIMING_S
        ),
        "thorough": Amounts(8, 32, 32, 32, 40, 20.0),
    }
)

LEAST_TRIALS, LEAST_CLIPS = 4, 4
"""Trials, and validation and held-out clips, that a time limit leaves at least."""

PLAN_MARGIN = 1.1
"""Planned time of a calibration ÷ what its runs would take at the speed of the first ones."""
