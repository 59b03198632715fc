"""What a calibration is asked for, and what it decides by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from spark3r.errors import ClipError, Spark3rError
from spark3r.families.base import Family, unwrap
from spark3r.patching.patch import is_applied
from spark3r.reduction.operators import Operators, QueryMerging, TokenStride
from spark3r.runner import HALF, Runner, matmul_dtype
from spark3r.timing import Timer

from .budget import Budget
from .clips import Split
from .defaults import TRIALS, Objective, Source
from .progress import Reporter

OPERATORS = (
    Operators(),
    Operators(QueryMerging(unmerge="linear"), TokenStride(keep_anchor=True, mass_correction=1.0)),
)
"""What layers choose from: the paper's operators, and the ones most faithful to dense."""

QUERY_FACTORS = (2, 3, 4, 6, 8)
KEY_VALUE_FACTORS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
"""Factors that drift is measured at; 1 comes with them."""

PROBED_QUERY_FACTORS = (2, 4, 8)
PROBED_KEY_VALUE_FACTORS = (2, 4, 8, 16, 32)
"""Those that are probed where drift cannot be trusted: a probe costs a whole run."""

ANCHOR_FACTOR = 4
"""Factor of each axis that every layer is probed at, to scale drift by."""

KNAPSACK_SHARES = (0.64, 0.8, 1.25, 1.6)
"""Other goals that the knapsack is also solved for, as shares of the one asked for: of the way from
the wall to the budget, or of a deviation."""

PROBED_CLIPS = 2
"""Clips of the search that are probed; drift is measured on the others."""


def probed_of(clips: int) -> int:
    """Return how many of the search's clips are probed: half of them where there are few."""
    return min(PROBED_CLIPS, max(1, clips // 2))


PAPER_POINT, PAPER_RAISE = 32, 8
"""The paper's probe: all layers at 32, one raised to 8 times that. Brought down to short clips."""


@dataclass(frozen=True)
class Settings:
    """What a calibration is asked for.

    Attributes:
        budget: How long a clip may take; None where a deviation is the limit.
        max_deviation: Largest mean score by deviation, of which the least latency is sought; see
            `calibrate.measure.score`. None where there is a budget.
        target_frames: Length that the budget must hold for; None chooses one.
        trials: Trials of the search beyond those it starts from.
        timeout_s: Propose no further trial after so many seconds of search.
        objective: Which metrics count.
        source: What schedules are judged by; None takes error where all clips have ground truth,
            and deviation otherwise.
        seed: Of everything random.
        storage: Where trials are kept; see `calibrate.search.storage.open_studies`.
        resume: Whether to go on with an earlier search of the same model, clips and settings.
        cache: Folder of measured sensitivities; None keeps none.
        timing_s: About how many seconds each timing may take.
        name: What people call the model.
        weights: Where its weights are found.
        dtype: Precision of every pass by autocast, ``float32`` for none: then it is that of the
            parameters, which nothing here casts.
    """

    budget: Budget | None = None
    max_deviation: float | None = None
    target_frames: int | None = None
    trials: int = TRIALS
    timeout_s: float | None = None
    objective: Objective = "balanced"
    source: Source | None = None
    seed: int = 0
    storage: str | Path | None = None
    resume: bool = False
    cache: Path | None = None
    timing_s: float = 15.0
    name: str | None = None
    weights: str | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.max_deviation is None):
            raise ValueError("expected either a budget or a largest deviation")
        if self.dtype not in (torch.float32, *HALF):
            raise ValueError(
                f"dtype is {self.dtype}, expected torch.float32, torch.bfloat16 or torch.float16"
            )

    @property
    def asked(self) -> str:
        """What was asked for, as on the command line."""
        if self.budget is not None:
            return f"--budget {self.budget.text}"
        return f"--max-deviation {100 * (self.max_deviation or 0.0):g}%"


@dataclass(frozen=True)
class Job:
    """A calibration, as every step of it takes it.

    Attributes:
        runner: The model itself, unwrapped, without a schedule between the steps.
        settings: What is asked for.
        source: What schedules are judged by.
        reporter: Receives progress and messages, by default nothing is shown.
        timer: Takes the latencies.
    """

    runner: Runner
    settings: Settings
    source: Source
    reporter: Reporter = Reporter()
    timer: Timer = Timer()

    @property
    def depth(self) -> int:
        """Number of global attention layers."""
        return self.runner.depth


def default_source(split: Split, settings: Settings) -> Source:
    """Return what schedules are judged by: what was asked for, or what the clips can tell.

    Without ground truth it is deviation, which on the reference model ranks schedules more like
    error on other clips than consistency does (docs/method/quality.md).

    Raises:
        ClipError: If error is asked for, and a clip has no ground truth.
    """
    if settings.max_deviation is not None:
        return "deviation"
    lacking = [clip.name for clip in split.clips if not clip.has_ground_truth]
    if settings.source == "error" and lacking:
        raise ClipError(
            f"clip '{lacking[0]}' has no ground truth, so that there is no error to judge by: "
            "judge by deviation or consistency, or calibrate on rendered clips"
        )
    if settings.source is not None:
        return settings.source
    return "deviation" if lacking else "error"


def make_job(
    model: nn.Module,
    split: Split,
    settings: Settings,
    *,
    family: Family | None = None,
    reporter: Reporter = Reporter(),
    timer: Timer = Timer(),
) -> Job:
    """Return the job of calibrating a live model.

    Raises:
        FamilyError: If the model is of no known family and none is given.
        Spark3rError: If the model carries a schedule, or autocast is on already.
    """
    root = unwrap(model)
    if is_applied(root):
        raise Spark3rError("the model carries a schedule already: remove it before calibrating")
    runner = Runner.of(root, family, settings.dtype)
    if matmul_dtype(torch.float32, runner.device) != torch.float32:
        raise Spark3rError(
            "calibrate is called inside torch.autocast, which would also cover what is computed "
            "from the model's outputs: leave that block and say the precision by dtype="
        )
    return Job(runner, settings, default_source(split, settings), reporter, timer)
