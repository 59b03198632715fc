"""A calibration in seconds: a model of two layer pairs, four clips of four frames, no clock."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from small_models import make_model
from torch import nn

from calibrate.defaults import EFFORTS
from calibrate.measure.quality import Quality, assess
from calibrate.measure.sensitivity import sensitivities
from calibrate.measure.timing import LayerTiming, PassTiming
from calibrate.progress import Reporter
from spark3r import Clip, Prediction, Schedule
from spark3r.latency import TERMS, LatencyModel
from spark3r.layout import TokenLayout
from spark3r.patching.apply import is_applied
from spark3r.reference.scenes.render import rendered_clip
from spark3r.runner import Runner, dtype_of
from spark3r.timing import Latency, Timer, Treatment

FRAMES, TARGET, SIDE = 4, 64, 16
WALL_MS, DENSE_MS = 50.0, 100.0

SHORT = ["--frames", "4", "--size", "16", "--target-frames", "64", "--trials", "2"]
CLIPS = [part for seed in range(4) for part in ("--clip", f"rendered:{1_000_000 + seed}")]
JOB = [*SHORT, *CLIPS, "--model", "tiny_job:make_tiny"]


SENSITIVITIES = Path(tempfile.mkdtemp(prefix="spark3r-sensitivities-"))
"""Folder that keeps sensitivities, so that those of the tiny model are measured once."""
atexit.register(shutil.rmtree, SENSITIVITIES, ignore_errors=True)


def clips(count: int = 4) -> list[Clip]:
    """Return clips. Four are two for the search, one for validation and one held out."""
    return [_clip(1_000_000 + seed) for seed in range(count)]


@cache
def _clip(seed: int) -> Clip:
    return rendered_clip(seed, FRAMES, SIDE, SIDE)


def remember(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute once what many calibrations need.

    Clips are rendered once, the tiny model runs once on each of them under each schedule, and each
    of these runs is judged once.
    """
    monkeypatch.setattr("spark3r.reference.scenes.render.rendered_clip", _rendered)
    monkeypatch.setattr(Runner, "predict", _predicted)
    monkeypatch.setattr("calibrate.measure.evaluator.assess", _assessed)


_rendered = cache(rendered_clip)
_predict = Runner.predict
_predictions: dict[object, Prediction] = {}
_kept: set[int] = set()  # identities of these predictions, which live as long as the session
_qualities: dict[object, Quality] = {}


def _predicted(runner: Runner, clip: Clip) -> Prediction:
    full = runner.dtype in (None, torch.float32) and dtype_of(runner.model) == torch.float32
    if not (full and getattr(runner.model, "is_tiny", False)):
        return _predict(runner, clip)
    key = (applied_schedule(runner.model), clip.name, clip.digest())
    if key not in _predictions:
        _predictions[key] = _predict(runner, clip)
        _kept.add(id(_predictions[key]))
    return _predictions[key]


def _assessed(
    prediction: Prediction, clip: Clip, dense: Prediction, *, clouds: bool = False
) -> Quality:
    if not {id(prediction), id(dense)} <= _kept:
        return assess(prediction, clip, dense, clouds=clouds)
    key = (id(prediction), id(dense), clip.name, clip.has_ground_truth, clouds)
    if key not in _qualities:
        _qualities[key] = assess(prediction, clip, dense, clouds=clouds)
    return _qualities[key]


@cache
def latency_model(layout: TokenLayout) -> LatencyModel:
    """A made-up model at the target length: attention products cost, dense takes `DENSE_MS`."""
    layout = replace(layout, frames=TARGET)
    shape = LatencyModel(TARGET, WALL_MS, dict.fromkeys(TERMS, 0.0) | {"attention": 1.0})
    products = shape.predict_ms(Schedule.dense(2), layout) - WALL_MS
    return replace(shape, term_ms=shape.term_ms | {"attention": (DENSE_MS - WALL_MS) / products})


def latency_ms(timing: object) -> float:
    """Return the latency of a pass by the made-up model, or of a layer, plus 1 ms."""
    assert isinstance(timing, PassTiming | LayerTiming)
    layout, model = timing.layout, latency_model(timing.layout)
    if isinstance(timing, LayerTiming):
        return 1.0 + (0.0 if timing.rule is None else model.layer_ms(timing.rule, layout))
    if timing.what == "wall":
        return model.wall_ms(layout)
    schedule = Schedule.dense(2) if timing.what == "dense" else timing.what
    return round(model.predict_ms(schedule, layout), 9)


Later = Callable[[dict[str, Latency], set[str]], dict[str, Latency]]


def unchanged(timed: dict[str, Latency], schedules: set[str]) -> dict[str, Latency]:
    return timed


@dataclass(frozen=True)
class FixedTimer(Timer):
    """Returns latencies of the made-up model instead of timing anything.

    Attributes:
        later: Changes what is timed once the latency model is fitted. It gets latencies by name,
            and the names of those that are schedules. The names of passes that show the pace of
            the machine begin with ``pace``.
        dense_fits: Whether a dense pass fits into memory.
        pace: How much slower the machine is all the time.
    """

    later: Later = unchanged
    dense_fits: bool = True
    pace: float = 1.0

    def time_in_turns(
        self, treatments: Sequence[Treatment], **options: object
    ) -> dict[str, Latency]:
        passes = {each.name: each.subject for each in treatments}
        if not self.dense_fits:
            passes = {name: each for name, each in passes.items() if not is_dense_pass(each)}
        timed = {
            name: Latency((self.pace * latency_ms(each),) * 3) for name, each in passes.items()
        }
        shown = {name for name in timed if name.startswith("pace")}
        if not shown:
            return timed  # for the latency model
        return self.later(timed, {name for name in timed if is_schedule(passes[name])})


def is_schedule(timing: object) -> bool:
    return isinstance(timing, PassTiming) and isinstance(timing.what, Schedule)


def is_dense_pass(timing: object) -> bool:
    return isinstance(timing, PassTiming) and timing.what == "dense"


@dataclass(frozen=True)
class FakeMachine(Timer):
    """A machine whose pace changes while it runs passes of the made-up model.

    Attributes:
        pace: Function from the seconds that have passed to how much slower the machine is.
        truth: Function from a pass or layer to its latency ÷ that of the made-up model.
        now_s: The seconds that have passed, in a list of one.
        taken: The subjects of all samples.
    """

    pace: Callable[[float], float] = lambda now_s: 1.0
    truth: Callable[[object], float] = lambda timing: 1.0
    now_s: list[float] = field(default_factory=lambda: [0.0])
    taken: list[object] = field(default_factory=list)

    def time_in_turns(
        self,
        treatments: Sequence[Treatment],
        *,
        least: int | Mapping[str, int] | None = None,
        **options: object,
    ) -> dict[str, Latency]:
        wanted = (
            least
            if isinstance(least, Mapping)
            else dict.fromkeys((each.name for each in treatments), least or 3)
        )
        samples: dict[str, list[float]] = {each.name: [] for each in treatments}
        for number in range(max(wanted.values(), default=0)):
            for each in treatments:
                if number >= wanted[each.name]:
                    continue
                subject = each.subject
                ms = self.truth(subject) * latency_ms(subject) * self.pace(self.now_s[0])
                self.now_s[0] += ms / 1000
                samples[each.name].append(ms)
                self.taken.append(subject)
        return {name: Latency(tuple(each)) for name, each in samples.items()}


class NoTimer(Timer):
    """Fails when something is timed."""

    def time_in_turns(
        self, treatments: Sequence[Treatment], **options: object
    ) -> dict[str, Latency]:
        raise AssertionError(f"timed for nothing: {[each.name for each in treatments]}")


class Notes(Reporter):
    """Stores what it receives, and raises Ctrl-C once at a point of a step.

    Attributes:
        lines: Messages.
        steps: Names of the steps, once for each report.
    """

    def __init__(self, interrupt_at: str | None = None, done: int = 0) -> None:
        self.lines: list[str] = []
        self.steps: list[str] = []
        self._interrupt_at, self._done = interrupt_at, done

    def progress(self, step: str, done: int, total: int) -> None:
        self.steps.append(step)
        if step == self._interrupt_at and done == self._done:
            self._interrupt_at = None
            raise KeyboardInterrupt

    def say(self, line: str) -> None:
        self.lines.append(line)


def main(arguments: list[str], timer: Timer = FixedTimer(), **options: Any) -> int:
    """Run the command without a clock."""
    from calibrate.cli.main import main

    return main(arguments, timer=timer, **options)


def make_tiny() -> nn.Module:
    """The tiny model, which `remember` knows by its mark."""
    model = make_model()
    model.is_tiny = True  # type: ignore[assignment]
    return model


def applied_schedule(model: nn.Module) -> Schedule | None:
    schedule: Schedule | None = None
    if is_applied(model):
        schedule = model.__dict__["_spark3r_handle"].schedule
    return schedule


# The models below have weights of their own: they must not be taken for the tiny model, whose
# sensitivities are kept.


def make_nan() -> nn.Module:
    """A model that returns NaN as soon as its second global layer is reduced."""
    model = make_model(seed=1)
    projection = model.aggregator.global_blocks[1].attn.proj

    def poison(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        schedule = applied_schedule(model)
        reduced = schedule is not None and not schedule.layers[1].is_dense
        return output * float("nan") if reduced else output

    projection.register_forward_hook(poison)
    return model


def make_hungry() -> nn.Module:
    """A model that runs out of memory where both global layers are reduced on both axes."""
    model = make_model(seed=2)

    def refuse(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        schedule = applied_schedule(model)
        if schedule and all(rule.query > 1 and rule.key_value > 1 for rule in schedule.layers):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    model.aggregator.global_blocks[1].attn.proj.register_forward_pre_hook(refuse)
    return model


def make_single() -> nn.Module:
    """A model with a head that does not run under autocast, like that of π³ on a CPU."""
    model = make_model(seed=3)

    def refuse(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        if (args[0] @ args[0].mT).dtype != torch.float32:
            raise RuntimeError("lu_cpu not implemented for 'BFloat16'\nat some place")

    model.camera_head.register_forward_pre_hook(refuse)
    return model


def place(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let the command run in a folder of its own.

    It cuts footage into four clips only, trusts drift so that few factors are probed, does not wait
    for the disk, and draws blank pictures.
    """
    remember(monkeypatch)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(SENSITIVITIES))
    efforts = {name: each._replace(stretches=4) for name, each in EFFORTS.items()}
    monkeypatch.setattr("calibrate.cli.clips.EFFORTS", efforts)
    trusting = partial(sensitivities, trusted=-1.0)
    monkeypatch.setattr("calibrate.measure.measurements.sensitivities", trusting)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for picture in ("sensitivity_picture", "schedules_picture", "trade_off_picture"):
        monkeypatch.setattr(f"calibrate.report.page.{picture}", blank_picture)


@cache
def profile_text() -> str:
    """Return the profile that ``calibrate --budget 75%`` makes of the tiny model; made once."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        place(patch, Path(folder))
        assert main(["--budget", "75%", *JOB, "--output", "a.json", "--quiet"]) == 0
        return Path("a.json").read_text(encoding="utf-8")


def blank_picture(*_: object) -> Figure:
    """Return an empty figure of one pixel: drawing takes as long as a whole tiny calibration."""
    return Figure(figsize=(0.01, 0.01))
