"""Peak memory of every family: dense, dense with the memory saver, and reduced with it.

    python benchmarks/memory.py count --output benchmarks/results/memory.json
    python benchmarks/memory.py measure --frames 24 --output benchmarks/results/memory-measured.json

`count` runs the real architectures at their real size on the meta device. Nothing is computed: the
bytes of every tensor are added when it is created and subtracted when it is dropped. Fused
attention counts as its inputs and its output. Workspaces and fragmentation of a device are not
included. `measure` runs small instances of the same code on the CPU, reads the peak memory of the
process, and counts the same run. It shows how accurate a count is.

Upstream code is found as in the tests, whose small instances are measured: on the import path or in
the folders that SPARK3R_UPSTREAM names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from results_io import write_result
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import spark3r
from spark3r import Operators, QueryMerging, Schedule, load_profile
from spark3r.loading.upstream import UPSTREAMS
from spark3r.memory import peak_extra_mb
from spark3r.sdpa import ReplaceSDPA

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from family_cases import ALL_CASES, build, images, missing

# Family, variant, profile, and image size after the model's own preprocessing of 4:3 footage.
REAL = {
    "VGGT-1B": ("vggt", "1b", "vggt-1b", (392, 518)),
    "Pi3": ("pi3", "pi3", "pi3", (434, 574)),
    "Pi3X": ("pi3", "pi3x", "pi3x", (434, 574)),
    "DA3-Large": ("da3", "large", "da3-large", (378, 504)),
    "DA3-Giant": ("da3", "giant", "da3-giant", (378, 504)),
    "VGGT-Omega-1B": ("omega", "1b", "vggt-omega-1b", (448, 592)),
}
MODES = ("dense", "saver", "reduced")


class Count(TorchDispatchMode):
    """Adds up the bytes of all living tensors and remembers their maximum.

    Args:
        before: Tensors that exist before. Their views do not count.
    """

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def fused_attention(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Return an output of attention and allocate nothing else, as fused kernels do."""
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def counted(model: nn.Module, clip: torch.Tensor) -> float:
    """Return the peak in MB of the tensors that a pass creates, its result included."""
    before = (*model.parameters(), *model.buffers(), clip)
    with torch.no_grad(), Count(before) as count:
        model(clip)
    return count.peak / 1e6


def in_mode(
    mode: str, model: nn.Module, schedule: Schedule, run: Callable[[], float | None]
) -> float | None:
    """Run a call on the dense model, on it with the memory saver, or reduced with the saver."""
    # Dense has a schedule of factors 1, because upstream's rotary embedding reads values.
    applied = schedule if mode == "reduced" else Schedule.dense(len(schedule.layers))
    with spark3r.apply(model, applied, save_memory=mode != "dense"):
        return run()


def on_meta(family: str, variant: str) -> Any:
    """Return a real architecture on the meta device."""
    # DINOv2's constructor reads these values.
    linspace = partial(torch.linspace, device="cpu")
    with torch.device("meta"), patch("torch.linspace", linspace):
        model: Any = UPSTREAMS[family].random(variant)
    if hasattr(model, "disable_multimodal"):
        model.disable_multimodal()  # its control flow depends on the values of depths and poses
    return model.to("meta").eval()


def count(models: list[str], frames: list[int]) -> list[dict[str, Any]]:
    """Return counted peaks of real architectures at several lengths."""
    rows = []
    for name in models:
        family, variant, profile, size = REAL[name]
        model = on_meta(family, variant)
        schedule = load_profile(profile).schedule()
        for length in frames:
            clip = torch.empty(1, length, 3, *size, device="meta")

            def run(model: nn.Module = model, clip: torch.Tensor = clip) -> float:
                # Depth-Anything-3 switches autocast off, which the meta device does not support.
                with (
                    ReplaceSDPA(fused_attention),
                    patch("torch.autocast", lambda **_: nullcontext()),
                ):
                    return counted(model, clip)

            weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
            peaks = {mode: in_mode(mode, model, schedule, run) for mode in MODES}
            rows.append(
                {
                    "model": name,
                    "profile": profile,
                    "frames": length,
                    "image": size,
                    "dtype": "float32",
                    "weights_mb": round(weights, 1),
                    "peak_mb": {mode: round(peak or 0.0, 1) for mode, peak in peaks.items()},
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def measure(frames: int, only: str | None) -> list[dict[str, Any]]:
    """Return measured and counted peaks of the tests' small instances of upstream code."""
    rows = []
    for case in ALL_CASES:
        if not case.needs or missing(case) or only not in (None, case.name):
            continue
        # With one mapping per large tensor a process returns freed memory at once.
        command = [sys.executable, __file__, "one", "--case", case.name, "--frames", str(frames)]
        settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        row: dict[str, Any] = {"model": case.name, "frames": frames, "peak_mb": {}}
        for mode in MODES:
            printed = subprocess.run(
                [*command, "--mode", mode], env=settings, check=True, stdout=subprocess.PIPE
            ).stdout
            row["peak_mb"][mode] = json.loads(printed.splitlines()[-1])
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    return rows


def one(name: str, frames: int, mode: str) -> dict[str, float | None]:
    """Return the measured and the counted peak of one small instance in one mode, in MB."""
    case = next(case for case in ALL_CASES if case.name == name)
    model, clip = build(case), images(case, frames, rows=8, columns=10)
    schedule = Schedule.uniform(case.layers, 2, 4, operators=Operators(QueryMerging(group=20)))
    warm_up = images(case, 17, rows=2, columns=2)

    def measured() -> float | None:
        with torch.no_grad():
            model(warm_up)
            return peak_extra_mb(lambda: model(clip))

    figures = {
        "measured": in_mode(mode, model, schedule, measured),
        "counted": in_mode(mode, model, schedule, lambda: counted(model, clip)),
    }
    return {key: None if peak is None else round(peak, 1) for key, peak in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "what", choices=("count", "measure", "one"), help="one: a single case, used by measure"
    )
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[100], help="lengths (default: 100)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write; by default it is printed")
    parser.add_argument(
        "--models", nargs="+", choices=REAL, default=list(REAL), help="to count (default: all)"
    )
    parser.add_argument(
        "--case", help="the only small instance to measure, by its name in the tests"
    )
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # warnings of upstream code
    torch.set_num_threads(1)
    if arguments.what == "one":
        print(json.dumps(one(arguments.case, arguments.frames[0], arguments.mode)))
        return
    frames = arguments.frames
    rows = (
        count(arguments.models, frames)
        if arguments.what == "count"
        else measure(frames[0], arguments.case)
    )
    write_result({"what": arguments.what, "rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
