"""The request of a calibration, and the job that every step of it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from spark3r.errors import ClipError, Spark3rError
from spark3r.families.base import Family, unwrap
from spark3r.identity import fingerprint
from spark3r.patching.apply import is_applied
from spark3r.runner import HALF, Runner, matmul_dtype
from spark3r.timing import Timer

from .budget import Budget
from .clips import Split
from .defaults import TIMER, TIMING_S, TRIALS, Objective, Source
from .progress import Reporter
from .ranks import ONE_PROCESS, Ranks


@dataclass(frozen=True)
class Settings:
    """The request of a calibration.

    Attributes:
        budget: Largest latency; None where a deviation is the limit.
        max_deviation: Largest mean score by deviation, within which the least latency is sought;
            see `calibrate.measure.score`. None where there is a budget.
        target_frames: Length in frames that the budget must hold for; None chooses one.
        trials: Trials of the search beyond those of the initial schedules, default `TRIALS`; 0
            searches nothing, and the knapsack's answer to the sensitivities is exported.
        time_limit_s: Seconds that the whole calibration is planned to take; None for no limit.
        objective: Metrics that count.
        source: What schedules are judged by; None takes error if all clips have ground truth, and
            deviation otherwise.
        seed: Seed of the search.
        storage: Path of a journal file, or an Optuna URL, that stores the trials; None stores none.
        resume: Whether to continue an earlier search of the same model, clips and settings.
        cache: Folder that stores measured sensitivities; None stores none.
        timing_s: Approximate seconds of each timing step, default `TIMING_S`.
        name: Name of the model in its profile.
        weights: Where the model's weights are found, for its profile.
        dtype: Autocast precision of every pass: ``bfloat16`` or ``float16``; ``float32`` runs
            without autocast, in the precision of the parameters.
    """

    budget: Budget | None = None
    max_deviation: float | None = None
    target_frames: int | None = None
    trials: int = TRIALS
    time_limit_s: float | None = None
    objective: Objective = "balanced"
    source: Source | None = None
    seed: int = 0
    storage: str | Path | None = None
    resume: bool = False
    cache: Path | None = None
    timing_s: float = TIMING_S
    name: str | None = None
    weights: str | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.max_deviation is None):
            raise ValueError("expected either a budget or max_deviation")
        if self.max_deviation is not None and not 0 < self.max_deviation < math.inf:
            raise ValueError(
                f"max_deviation is {self.max_deviation}, expected a positive number such as 0.01 "
                "for 1 %"
            )
        if self.max_deviation is not None and self.source not in (None, "deviation"):
            raise ValueError(
                f"max_deviation judges by deviation, not by {self.source}: leave out source"
            )
        if self.resume and self.storage is None:
            raise ValueError("resume continues the search in a storage: give storage as well")
        if self.resume and not self.trials:
            raise ValueError("resume continues a search, and effort quick has none")
        if self.dtype not in (torch.float32, *HALF):
            raise ValueError(
                f"dtype is {self.dtype}, expected torch.float32, torch.bfloat16 or torch.float16"
            )

    @property
    def goal_text(self) -> str:
        """The budget or deviation as on the command line."""
        if self.budget is not None:
            return f"--budget {self.budget.text}"
        return f"--max-deviation {100 * (self.max_deviation or 0.0):g}%"


@dataclass(frozen=True)
class Job:
    """A model and the request for it, as every step of a calibration takes them.

    Attributes:
        runner: The model, unwrapped and unpatched between the steps.
        settings: The request.
        source: What schedules are judged by.
        reporter: Receives progress and messages. By default nothing is shown.
        timer: Takes the latencies.
        ranks: Processes that share the passes over clips. By default this one is alone.
        threads: Threads that latencies are taken with; None for those of this process.
        elapsed_s: Function that returns the seconds since the calibration began.
    """

    runner: Runner
    settings: Settings
    source: Source
    reporter: Reporter = Reporter()
    timer: Timer = TIMER
    ranks: Ranks = ONE_PROCESS
    threads: int | None = None
    elapsed_s: Callable[[], float] = lambda: 0.0

    @property
    def is_late(self) -> bool:
        """Whether the time limit has passed, so that what can be left out is left out."""
        limit_s = self.settings.time_limit_s
        return limit_s is not None and self.elapsed_s() > limit_s

    @property
    def depth(self) -> int:
        """Number of global attention layers."""
        return self.runner.depth

    @cached_property
    def fingerprint(self) -> str | None:
        """Fingerprint of all parameters of the model, None if they have no values."""
        return fingerprint({"model": self.runner.root})


def default_source(split: Split, settings: Settings) -> Source:
    """Return what schedules are judged by: `Settings.source`, or what the clips allow.

    Without ground truth it is deviation, which on the reference model ranks schedules more like
    error on other clips than consistency does (docs/method/quality.md).

    Raises:
        ClipError: If the source is error, and a clip has no ground truth.
    """
    if settings.max_deviation is not None:
        return "deviation"
    lacking = [clip.name for clip in split.clips if not clip.has_ground_truth]
    if settings.source == "error" and lacking:
        raise ClipError(
            f"clip '{lacking[0]}' has no ground truth, so there is no error to judge by: judge by "
            "deviation or consistency, or calibrate on rendered clips"
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
    timer: Timer = TIMER,
    elapsed_s: Callable[[], float] = lambda: 0.0,
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
            "calibrate is called inside torch.autocast, which would also lower the precision of "
            "the metrics: leave that block and give the precision as dtype="
        )
    return Job(
        runner, settings, default_source(split, settings), reporter, timer, elapsed_s=elapsed_s
    )
