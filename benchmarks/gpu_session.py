"""What all stages of a GPU run share: the device, the model, the schedules, and how they time."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:
    # Before anything imports Triton, so that our kernels run where there is no GPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from gpu_lines import Lines
from results_io import RESULTS
from torch import Tensor

from spark3r import Schedule, Spark3rError, TokenLayout, load_model
from spark3r.reduction.operators import Operators, TokenStride
from spark3r.runner import Runner
from spark3r.schedule import PAPER_TIER, LayerRule, paper_schedule
from spark3r.timing import make_stopwatch

SIZES = {
    "vggt": (392, 518),
    "pi3": (434, 574),
    "da3": (378, 504),
    "omega": (448, 592),
    "mapanything": (392, 518),
    "worldmirror": (392, 518),
    "panovggt": (518, 1036),
}
"""Height and width in pixels that each family's preprocessing makes of 4:3 footage."""

TINY_PATCHES = (3, 4)
TINY_SENSITIVE = (0,)

LAYOUT = TokenLayout(1000, 28, 37, special=5, anchor_frame=0)
"""Tokens of 1,000 frames in VGGT."""

TINY_LAYOUT = TokenLayout(40, 3, 4, special=5, anchor_frame=0)

MASS = Operators(key_value=TokenStride(keep_anchor=True, mass_correction=1.0))

_ATTENTION = re.compile(r"sdpa|fmha|flash|attention|attn", re.IGNORECASE)


@dataclass(frozen=True)
class Session:
    """One stage's process.

    Attributes:
        lines: Where figures go.
        device: Device of all work.
        name: Name of the model, as for `spark3r.load_model`.
        tiny: Whether sizes are tiny and the model is small.
        until: Time of the monotonic clock at which the stage is ended.
    """

    lines: Lines
    device: torch.device
    name: str
    tiny: bool
    until: float

    @classmethod
    def make(cls, lines: Lines, device: str, name: str, tiny: bool, seconds: float) -> Session:
        """Return the session of a stage that has some seconds."""
        warnings.simplefilter("ignore")  # of upstream code, and of shapes that are new to a kernel
        torch.manual_seed(0)
        chosen = torch.device(device)
        if chosen.type == "cuda" and chosen.index is None:  # some functions want a number
            chosen = torch.device("cuda", torch.cuda.current_device())
        return cls(lines, chosen, name, tiny, time.monotonic() + seconds)

    @property
    def on_cuda(self) -> bool:
        """True on a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Precision of attention."""
        return torch.bfloat16 if self.on_cuda else torch.float32

    @property
    def left_s(self) -> float:
        """Seconds until the stage is ended."""
        return self.until - time.monotonic()

    @property
    def layout(self) -> TokenLayout:
        """Token layout of the stages that have no model."""
        return TINY_LAYOUT if self.tiny else LAYOUT

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return random normal numbers on the device."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def ms(self, call: Callable[[], object], rounds: int = 3, warm: int = 1) -> float:
        """Return the least milliseconds of some calls, after some that do not count.

        Tiny sizes are called once.
        """
        watch = make_stopwatch(self.device)
        if self.tiny:
            rounds, warm = 1, 0
        for _ in range(warm):
            watch(call)
        return round(min(watch(call) for _ in range(rounds)), 3)

    def runner(self) -> Runner:
        """Return the model with random weights, on the device, and write what it is."""
        runner = self._small() if self.tiny else self._whole()
        weights = sum(each.nbytes for each in runner.root.parameters())
        self.lines.put(
            "model",
            family=runner.family.name,
            layers=runner.depth,
            weights_gb=round(weights / 1e9, 3),
        )
        return runner

    def _whole(self) -> Runner:
        try:
            with torch.device(self.device):  # random weights are made there, in a second
                model = load_model(self.name, self.device)
        except Spark3rError:
            model = load_model(self.name, self.device)
        return Runner.of(model, dtype=torch.bfloat16 if self.on_cuda else None)

    def _small(self) -> Runner:
        sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
        from family_cases import CASES, build

        family = self.name.partition(":")[0]
        fitting = [case for case in CASES if case.family == family]
        return Runner.of(build(fitting[-1]).to(self.device))  # upstream's code, if it is there

    def clip(self, runner: Runner, frames: int, on_device: bool = True) -> Tensor:
        """Return a random clip ``[S, 3, H, W]`` of the size that the model expects."""
        side = runner.family.metadata(runner.root)["patch_size"]
        rows, columns = TINY_PATCHES
        size = (rows * side, columns * side) if self.tiny else SIZES[runner.family.name]
        return torch.rand(frames, 3, *size, device=self.device if on_device else "meta")

    def frames(self, real: int, tiny: int) -> int:
        """Return the length of a clip."""
        return tiny if self.tiny else real


def schedules(runner: Runner, tiny: bool) -> dict[str, Schedule]:
    """Return the paper's schedule, and its factors at 1,000 frames with mass correction."""
    chosen = TINY_SENSITIVE if tiny else None
    paper = paper_schedule(runner.family.name, runner.depth, sensitive=chosen)
    sensitive = [rule.key_value < PAPER_TIER for rule in paper.layers]
    few, many = (2, 4) if tiny else (25, 75)
    rules = tuple(LayerRule(4, few if each else many) for each in sensitive)
    return {"paper": paper, "mass": Schedule(rules, MASS)}


def at_any_length(schedule: Schedule, frames: int) -> Schedule:
    """Return a schedule with the factors that it has at some length, whatever the length."""
    rules = schedule.resolve(frames)
    layers = tuple(LayerRule(rule.query, rule.key_value, rule.operators) for rule in rules)
    return replace(Schedule(layers), operators=schedule.operators)


def attention_kernel(call: Callable[[], object], on_cuda: bool) -> str | None:
    """Run a call and return the attention kernel that took most of its time, None if unknown."""
    kind = torch.profiler.ProfilerActivity
    try:
        with torch.profiler.profile(activities=[kind.CUDA if on_cuda else kind.CPU]) as found:
            call()
    except (AssertionError, RuntimeError):  # the machine does not let it see its kernels
        return None
    named = [each for each in found.key_averages() if _ATTENTION.search(each.key)]
    return max(named, key=own_us).key if named else None


def own_us(event: Any) -> float:
    """Return the microseconds of a profiler's event on its device."""
    names = ("self_device_time_total", "self_cuda_time_total")  # the second before torch 2.4
    on_device = next((getattr(event, name) for name in names if hasattr(event, name)), 0)
    return float(on_device or event.self_cpu_time_total)


def promised_frames(memory_gb: int) -> int:
    """Return the length that the documentation gives for a card of this size."""
    stored = json.loads((RESULTS / "cards.json").read_text(encoding="utf-8"))
    return max(row["frames"] for row in stored["rows"] if row["memory_gb"] == memory_gb)
