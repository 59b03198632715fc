"""What could lie past the wall: three steps beside a reduced run, each alone, none on by default.

    python benchmarks/past_the_wall.py                                    # reference model, CPU
    python benchmarks/past_the_wall.py --model vggt:random --device cuda  # about 5 minutes, a guess

- ``compiled``: every block that attends inside frames is compiled. It runs on all frames at once:
  the memory saver's pieces are left out.
- ``head``: the depth head runs under bfloat16 autocast, its convolutions in channels-last.
- ``merged``: queries stay merged through output projection and MLP of the global blocks: a set of
  merged tokens shares one update, made from the mean of their hidden states.

All run in turns under one schedule, warmed up, and are compared with the run that has none of them
by time and by distance of depth (mean |log ratio|) and rotation (median over pairs of frames). None
is lossless. Distances of a model with random weights only say that a step does what it should.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import patch

# One busy-waiting thread beside another process distorts everything it touches.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from allocator import keep_freed_memory
from results_io import write_result
from torch import Tensor, nn

from spark3r import Clip, Prediction
from spark3r.benchmark.api import GRID, REFERENCE_GRID
from spark3r.benchmark.treatments import Treatment, treatments
from spark3r.cli.arguments import parse_grid
from spark3r.cli.tables import print_table
from spark3r.env import device_name
from spark3r.errors import FamilyError, Spark3rError
from spark3r.families.base import Family, unwrap
from spark3r.families.parts.recognition import has, locate
from spark3r.families.registry import detect
from spark3r.loading.load import load_model
from spark3r.metrics import log_depth_deviation, pose_metrics
from spark3r.reduction import merging
from spark3r.reduction.operators import CopyUnmerging, LinearUnmerging, Unmerging
from spark3r.reference.scenes.render import rendered_clip
from spark3r.reference.scenes.seeds import CALIBRATION
from spark3r.runner import device_of, predict, run
from spark3r.timing import Clock, interleaved

Step = Callable[[], AbstractContextManager[None]]

BASE = "as it is"
ENCODERS = frozenset(("patch_embed", "encoder"))
HEADS = ("depth_head", "head", "model.head", "da3.head", "model.da3.head", "dense_head")
"""Reference model and VGGT; Depth-Anything-3, its API object, and the nested model; VGGT-Omega."""
BLOCK = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")
MERGED_FAMILIES = ("reference", "vggt", "da3")
"""Families whose global blocks are residual updates of these parts and nothing else."""


@dataclass(frozen=True)
class Row:
    """One step: latency of a pass, and its ratio to and distances from the run without a step."""

    step: str
    ms: float
    spread_ms: float
    n: int
    ratio: float
    log_depth: float
    rotation_deg: float


def steps(
    model: nn.Module, *, backend: str = "inductor", head_dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Step], dict[str, str]]:
    """Return the steps that the model has the parts for, and what it lacks for the others.

    A step is entered on top of a schedule and left before the schedule is taken off.
    ``head_dtype`` is the depth head's precision, float32 for no autocast.
    """
    root = unwrap(model)
    family = detect(root)
    makers = {
        "compiled": partial(compiled, root, family, backend),
        "head": partial(head, root, head_dtype),
        "merged": partial(merged, root, family),
    }
    found: dict[str, Step] = {}
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except FamilyError as error:
            missing[name] = str(error)
    return found, missing


def compiled(root: nn.Module, family: Family, backend: str) -> Step:
    """Compile the blocks that attend inside frames, once for all of one class."""
    whole = set(family.attention(root).values())
    blocks = [
        block
        for name, block in family.entry(root).named_modules()
        if getattr(block, "attn", None) not in {None, *whole} and not ENCODERS & {*name.split(".")}
    ]
    if not blocks:
        raise FamilyError("no block attends inside frames")
    make = partial(torch.compile, backend=backend, dynamic=False)
    forwards = {kind: make(kind.forward) for kind in {type(block) for block in blocks}}
    return lambda: forwards_replaced([(block, forwards[type(block)]) for block in blocks])


def head(root: nn.Module, dtype: torch.dtype) -> Step:
    """Run the depth head in another precision, its convolutions in channels-last."""
    found = locate(
        root, HEADS, lambda each: any(isinstance(part, nn.Conv2d) for part in each.modules())
    )
    if found is None:
        raise FamilyError("no depth head with convolutions")
    module, is_half = found[1], dtype != torch.float32

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # In here, because upstream turns autocast off around its heads.
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


def merged(root: nn.Module, family: Family) -> Step:
    """Keep queries merged up to the end of every global block."""
    blocks = [root.get_submodule(name.rpartition(".")[0]) for name in family.attention(root)]
    if family.name not in MERGED_FAMILIES or not all(has(block, *BLOCK) for block in blocks):
        raise FamilyError("global blocks of another shape than VGGT's")
    return lambda: forwards_replaced([(block, merged_block) for block in blocks])


def merged_block(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stand in for a global block's forward, tokens ``[B, N, C]`` to the same."""
    places: list[Tensor] = []

    def keep(_: Unmerging, query: Tensor, merged: Tensor, output: Tensor, *found: Any) -> Tensor:
        places.append(found[0])
        return output

    with (
        patch.object(CopyUnmerging, "restore", keep),
        patch.object(LinearUnmerging, "restore", keep),
    ):
        attended = self.ls1(self.attn(self.norm1(x), *args, **kwargs))  # [B, K, C]
    if not places:  # a layer that merges no queries
        x = x + attended
        return x + self.ls2(self.mlp(self.norm2(x)))
    hidden = merging.merge(x.unsqueeze(1), places[0], attended.shape[1]).squeeze(1)
    update = attended + self.ls2(self.mlp(self.norm2(hidden + attended)))
    return x + merging.unmerge(update.unsqueeze(1), places[0]).squeeze(1)


@contextmanager
def forwards_replaced(pairs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules another forward inside the block, bound to each."""
    with ExitStack() as stack:
        for module, forward in pairs:
            stack.enter_context(patch.object(module, "forward", MethodType(forward, module)))
        yield


def in_float32(output: Any) -> Any:
    """Return tensors, or a tuple, list or mapping of them, in float32; a mapping in place."""
    if isinstance(output, Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, tuple | list):
        return type(output)(in_float32(each) for each in output)
    if isinstance(output, dict):
        output.update({name: in_float32(value) for name, value in output.items()})
    return output


def compare(
    model: nn.Module,
    clip: Clip,
    schedule: Treatment,
    chosen: Mapping[str, Step],
    *,
    rounds: int = 5,
    clock: Clock = time.perf_counter,
) -> list[Row]:
    """Measure a schedule without any step and with each alone, in turns.

    The model is unpatched before and after; the clip's images lie on its device.
    """
    every: dict[str, Step] = {BASE: nullcontext, **chosen}
    stack = ExitStack()

    def enter(name: str) -> None:
        stack.close()
        print(name, file=sys.stderr, flush=True)
        stack.enter_context(schedule.put_on(model))
        stack.enter_context(every[name]())

    outputs: dict[str, Prediction] = {}
    with stack:
        for name in every:  # warms up, and compiles
            enter(name)
            outputs[name] = predict(model, clip)
        taken = interleaved(
            dict.fromkeys(every, lambda: run(model, clip.images)),
            before=enter,
            device=clip.images.device,
            rounds=rounds,
            warm_up_s=0,
            clock=clock,
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
    parser.add_argument("--model", default="reference", help="by name (default: reference)")
    parser.add_argument("--frames", type=int, help="default: 128, on a GPU 500")
    parser.add_argument("--grid", type=parse_grid, help="default: 28x37, reference model 8x8")
    parser.add_argument("--schedule", default="paper", help="default: paper; or uniform:4:16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", help="default: bfloat16 on a GPU, none elsewhere")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each, default: 5")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--cpu-time", action="store_true", help="as for spark3r bench")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args(argv)

    device = torch.device(options.device)
    frames, precision = (128, None) if device.type == "cpu" else (500, "bfloat16")
    frames, precision = options.frames or frames, options.autocast or precision
    try:
        model = load_model(options.model, device)
        (schedule,) = treatments((options.schedule,), model)
    except Spark3rError as error:
        parser.error(str(error))
    family = detect(model)
    patch_size, rendered = family.facts(unwrap(model))["patch_size"], family.name == "reference"
    grid = options.grid or (REFERENCE_GRID if rendered else GRID)
    height, width = grid[0] * patch_size, grid[1] * patch_size
    torch.manual_seed(0)
    if rendered:
        clip = rendered_clip(CALIBRATION[0], frames, height, width)
    else:
        clip = Clip("random", torch.rand(frames, 3, height, width))
    clip = replace(clip, images=clip.images.to(device))
    chosen, missing = steps(model, backend=options.backend)
    keep_freed_memory()
    with torch.autocast(device.type, getattr(torch, precision)) if precision else nullcontext():
        clock = time.process_time if options.cpu_time else time.perf_counter
        rows = compare(model, clip, schedule, chosen, rounds=options.rounds, clock=clock)
    columns = ("step", "ms", "spread", "n", "ratio", "log depth", "rotation deg")
    formats = ("", ".1f", ".1f", "", ".3f", ".1e", ".1e")
    print_table(columns, [list(map(format, astuple(row), formats)) for row in rows])
    for name, reason in missing.items():
        print(f"{name}: not measured, the model has {reason}")
    if options.output is not None:
        settings = {k: str(v) for k, v in vars(options).items() if v is not None and k != "output"}
        record = {
            "settings": settings | {"frames": frames, "grid": grid, "autocast": precision},
            "device": device_name(device),
            "rows": [asdict(row) for row in rows],
            "not_measured": missing,
        }
        write_result(record, options.output)


if __name__ == "__main__":
    main()
