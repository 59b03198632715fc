"""Three steps that could make a reduced pass faster than the wall. None is on by default.

    python benchmarks/past_the_wall.py

This runs the reference model on a CPU. On a GPU, stage ``past`` of `benchmarks/gpu.py` runs the
same steps on VGGT.

- ``compiled``: every block that attends inside frames is compiled, the encoder's too. It runs on
  some frames at a time, as the memory saver has it.
- ``head``: the depth head runs under bfloat16 autocast, with convolutions in channels-last.
- ``merged``: queries stay merged through output projection and MLP of the global blocks. Merged
  tokens share one update, which is computed from the mean of their hidden states.

Each step is measured alone, warmed up and in turns under one schedule. It is compared with the run
without any step by time and by distance of depth (mean |log ratio|) and rotation (median over pairs
of frames). None is lossless.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

# A thread that waits busily distorts the times of everything that runs beside it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from allocator import keep_freed_memory
from results_io import write_result
from torch import Tensor, nn

from spark3r import Clip, FamilyError, Prediction, Spark3rError, load_model
from spark3r.benchmark.api import REFERENCE_GRID
from spark3r.benchmark.treatments import Apply, treatments
from spark3r.cli.arguments import parse_grid
from spark3r.cli.tables import print_table
from spark3r.env import device_name
from spark3r.families.parts.recognition import has, locate
from spark3r.metrics import log_depth_deviation, pose_metrics
from spark3r.reduction import merging
from spark3r.reduction.merging import MergePlan
from spark3r.reduction.operators import UNMERGINGS, Unmerging
from spark3r.reference.scenes.render import rendered_clip
from spark3r.reference.scenes.seeds import CALIBRATION
from spark3r.runner import Runner, device_of
from spark3r.timing import TIMER, Timer, Treatment

Step = Callable[[], AbstractContextManager[None]]

BASE = "as it is"
HEADS = ("depth_head", "head", "model.head", "da3.head", "model.da3.head", "dense_head")
"""Reference model and VGGT; Depth-Anything-3, its API object, and the nested model; VGGT-Omega."""
BLOCK = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")
MERGED_FAMILIES = ("reference", "vggt", "da3")
"""Families whose global blocks consist of residual updates by the parts in `BLOCK`."""


@dataclass(frozen=True)
class Row:
    """Result of one step: latency, and ratio to and distances from the run without a step."""

    step: str
    ms: float
    spread_ms: float
    n: int
    ratio: float
    log_depth: float
    rotation_deg: float


def steps(
    runner: Runner, *, backend: str = "inductor", head_dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Step], dict[str, str]]:
    """Return the steps that the model supports, and for each other step the reason.

    A step is entered after a schedule was applied, and left before the schedule is removed.
    ``head_dtype`` is the precision of the depth head; float32 means no autocast.
    """
    makers = {
        "compiled": partial(compiled, runner, backend),
        "head": partial(head, runner, head_dtype),
        "merged": partial(merged, runner),
    }
    found: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except FamilyError as error:
            missing[name] = str(error)
    return found, missing


def compiled(runner: Runner, backend: str) -> Step:
    """Return the step that compiles the blocks of frames and of the encoder, once per class.

    Their attention runs its class's forward meanwhile. A forward on the instance, such as that of
    our fused kernel, would make a graph for every block, and the compiler stops after a few; it
    fuses norm and rotary embedding by itself.
    """
    whole = set(runner.attention.values())
    blocks: list[Any] = [
        block
        for block in runner.family.entry(runner.root).modules()
        if getattr(block, "attn", None) not in {None, *whole}
    ]
    if not blocks:
        raise FamilyError("no block attends inside frames")
    # The class changes, because the memory saver runs the class's forward on some frames at a time.
    make = partial(torch.compile, backend=backend, dynamic=False)
    fast = {
        kind: type(f"Compiled{kind.__name__}", (kind,), {"forward": make(kind.forward)})
        for kind in {type(block) for block in blocks}
    }

    @contextmanager
    def step() -> Iterator[None]:
        before = [(type(block), block.attn.__dict__.pop("forward", None)) for block in blocks]
        try:
            for block in blocks:
                block.__class__ = fast[type(block)]
            yield
        finally:
            for block, (kind, forward) in zip(blocks, before, strict=True):
                block.__class__ = kind
                if forward is not None:
                    block.attn.__dict__["forward"] = forward

    return step


def head(runner: Runner, dtype: torch.dtype) -> Step:
    """Return the step that runs the depth head in a precision, with channels-last convolutions."""
    found = locate(
        runner.root,
        HEADS,
        lambda each: any(isinstance(part, nn.Conv2d) for part in each.modules()),
    )
    if found is None:
        raise FamilyError("no depth head with convolutions")
    module, is_half = found[1], dtype != torch.float32

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Autocast is turned on here, because upstream turns it off around its heads.
        with torch.autocast(device_of(self).type, dtype) if is_half else nullcontext():
            return in_float32(type(self).forward(self, *args, **kwargs))

    @contextmanager
    def step() -> Iterator[None]:
        with forwards_replaced([(module, forward)]):
            module.to(memory_format=torch.channels_last)
            try:
                yield
            finally:
                module.to(memory_format=torch.contiguous_format)

    return step


def merged(runner: Runner) -> Step:
    """Return the step that keeps queries merged to the end of every global block."""
    names = [name.rpartition(".")[0] for name in runner.attention]
    blocks = [runner.root.get_submodule(name) for name in names]
    if runner.family.name not in MERGED_FAMILIES or not all(has(block, *BLOCK) for block in blocks):
        raise FamilyError("global blocks of another structure than VGGT's")

    @contextmanager
    def step() -> Iterator[None]:
        keep, registered = KeepMerged(), dict(UNMERGINGS)

        def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return merged_block(self, keep, x, *args, **kwargs)

        UNMERGINGS.update(dict.fromkeys(registered, keep))
        try:
            with forwards_replaced([(block, forward) for block in blocks]):
                yield
        finally:
            UNMERGINGS.update(registered)

    return step


@dataclass(frozen=True)
class KeepMerged(Unmerging):
    """Leave outputs merged, and remember the places that would undo it.

    Attributes:
        places: The places of the last call, ``[B, N]``; empty after they were taken.
    """

    name: ClassVar[str] = "merged"
    places: list[Tensor] = field(default_factory=list, compare=False)

    def unmerge(
        self, query: Tensor, merged: Tensor, output: Tensor, places: Tensor, plan: MergePlan
    ) -> Tensor:
        """Return the outputs of the merged queries, ``[B, H, K, D]``."""
        self.places.append(places)
        return output

    def describe(self) -> str:
        """Return ``left merged``."""
        return "left merged"


def merged_block(self: Any, keep: KeepMerged, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replace the forward of a global block, from tokens ``[B, N, C]`` to the same shape."""
    attended = self.ls1(self.attn(self.norm1(x), *args, **kwargs))  # [B, K, C]
    if not keep.places:  # a layer that merges no queries
        x = x + attended
        return x + self.ls2(self.mlp(self.norm2(x)))
    places = keep.places.pop()
    hidden = merging.merge(x.unsqueeze(1), places, attended.shape[1]).squeeze(1)
    update = attended + self.ls2(self.mlp(self.norm2(hidden + attended)))
    return x + merging.copy_back(update.unsqueeze(1), places).squeeze(1)


@contextmanager
def forwards_replaced(pairs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace the forward of modules inside the context."""
    before = [module.__dict__.get("forward") for module, _ in pairs]
    for module, forward in pairs:
        module.__dict__["forward"] = MethodType(forward, module)
    try:
        yield
    finally:
        for (module, _), earlier in zip(pairs, before, strict=True):
            if earlier is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = earlier


def in_float32(output: Any) -> Any:
    """Return an output in float32: a tensor, tuple, list or mapping, which changes in place."""
    if isinstance(output, Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, tuple | list):
        return type(output)(in_float32(each) for each in output)
    if isinstance(output, dict):
        output.update({name: in_float32(value) for name, value in output.items()})
    return output


def compare(
    runner: Runner,
    clip: Clip,
    schedule: Apply,
    chosen: Mapping[str, Step],
    timer: Timer = TIMER,
) -> list[Row]:
    """Return the results of a schedule without any step and with each step alone, in turns.

    The model is unpatched before and after. The clip's images are on its device.
    """
    every: dict[str, Step] = {BASE: nullcontext, **chosen}
    stack = ExitStack()

    def enter(name: str) -> None:
        stack.close()
        print(name, file=sys.stderr, flush=True)
        stack.enter_context(schedule())
        stack.enter_context(every[name]())

    outputs: dict[str, Prediction] = {}
    with stack:
        for name in every:  # warms up, and compiles
            enter(name)
            outputs[name] = runner.predict(clip)
        taken = timer.time_in_turns(
            [
                Treatment(name, lambda: runner.run(clip.images), partial(enter, name), name)
                for name in every
            ],
            device=clip.images.device,
            warmed_up=True,
        )
    base = outputs[BASE]
    return [
        Row(
            name,
            taken[name].median_ms,
            taken[name].spread_ms,
            taken[name].n,
            taken[name].median_ms / taken[BASE].median_ms,
            log_depth_deviation(output.depth, base.depth),
            pose_metrics(output.extrinsics, base.extrinsics).rotation_deg,
        )
        for name, output in outputs.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=128, help="default: 128")
    parser.add_argument("--grid", type=parse_grid, default=REFERENCE_GRID, help="default: 8x8")
    parser.add_argument(
        "--schedule", default="paper", help="default: paper; or such as uniform:4:16"
    )
    parser.add_argument("--rounds", type=int, default=5, help="samples of each (default: 5)")
    parser.add_argument("--backend", default="inductor", help="for torch.compile")
    parser.add_argument("--cpu-time", action="store_true", help="as for spark3r bench")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)

    runner = Runner.of(load_model("reference"))
    try:
        (schedule,) = treatments((options.schedule,), runner).values()
    except Spark3rError as error:
        parser.error(str(error))
    side = runner.family.metadata(runner.root)["patch_size"]
    height, width = (side * count for count in options.grid)
    clip = rendered_clip(CALIBRATION[0], options.frames, height, width)
    chosen, _ = steps(runner, backend=options.backend)
    keep_freed_memory()
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows = compare(runner, clip, schedule, chosen, Timer(clock, options.rounds))
    columns = ("step", "ms", "spread", "n", "ratio", "log depth", "rotation deg")
    formats = ("", ".1f", ".1f", "", ".3f", ".1e", ".1e")
    print_table(columns, [list(map(format, astuple(row), formats)) for row in rows])
    if options.output is not None:
        settings = {k: str(v) for k, v in vars(options).items() if k != "output"}
        record = {
            "settings": settings,
            "device": device_name("cpu"),
            "rows": [asdict(row) for row in rows],
        }
        write_result(record, options.output)


if __name__ == "__main__":
    main()
