"""One clip over several processes: bytes, memory and time of each, against one process.

    python benchmarks/shard.py --output benchmarks/results/shard.json

The reference model runs over a random clip under the paper's schedule, in processes of one thread
each. Bytes are counted where `torch.distributed` is called, and compared with what
`spark3r show --ranks` predicts. Memory is the bytes of all tensors that are alive at the peak of a
pass, without weights and images; what a kernel takes for itself is not counted. Time is CPU time,
and wall-clock time, which tells something where each process has a core of its own: the median of
passes after one that warms up. Ratios are the slowest rank's to one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from results_io import print_markdown, write_result
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import spark3r
from spark3r.benchmark.treatments import REFERENCE_SENSITIVE
from spark3r.reduction.gathering import received_bytes
from spark3r.reduction.sharding import Shard, deal, unit
from spark3r.reference.model import WIDTH
from spark3r.runner import Runner

SLOWEST = 0.6
"""Largest ratio of the time of two ranks to that of one process."""

LARGEST = 1.15
"""Largest ratio of a rank's memory to its share of that of one process."""


class Living(TorchDispatchMode):
    """Counts the bytes of storages that are made in a block and alive.

    Attributes:
        peak: Largest number of bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {each.untyped_storage()._cdata for each in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for each in _tensors(result):
            storage = each.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known and key not in given:
                self._known.add(key)
                self._now += size
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._drop, key, size)
        return result

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


def run_rank(rank: int, ranks: int, folder: str, frames: int, passes: int) -> None:
    """Run passes as one of some ranks, and write what they took."""
    torch.set_num_threads(1)
    file = f"file://{folder}/store{ranks}"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=ranks)
    model = spark3r.load_model("reference", "cpu")
    schedule = spark3r.paper_schedule("reference", 8, sensitive=REFERENCE_SENSITIVE)
    images = torch.rand(frames, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    handle = spark3r.apply(model, schedule, group=dist.group.WORLD, guard=False)
    own = images[handle.share(frames)].clone()
    del images
    sent = _counted()
    figures: dict[str, Any] = {"frames": len(own), "cpu_s": [], "wall_s": []}
    with torch.inference_mode():
        for _ in range(1 + passes):
            sent.clear()
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            model(own)
            figures["cpu_s"].append(time.process_time() - cpu)
            figures["wall_s"].append(time.perf_counter() - wall)
        figures["sent_bytes"] = list(sent)
        with Living() as living:
            model(own)
        figures["memory_mb"] = living.peak / 1e6
    Path(folder, f"{ranks}-{rank}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def _counted() -> list[int]:
    """Return a list to which every gathering from now on adds the bytes that this rank sends."""
    sent: list[int] = []
    for name in ("all_gather_single", "all_gather_into_tensor"):
        gather = getattr(dist, name, None)
        if gather is None:
            continue

        def counting(
            received: torch.Tensor, own: torch.Tensor, *rest: Any, gather: Any = gather, **more: Any
        ) -> Any:
            sent.append(own.numel() * own.element_size())
            return gather(received, own, *rest, **more)

        setattr(dist, name, counting)
    return sent


def predicted_bytes(frames: int, ranks: int) -> list[int]:
    """Return what a rank receives in each global layer."""
    model = spark3r.load_model("reference", "cpu")
    runner = Runner.of(model)
    whole = runner.layout(torch.zeros(2, 3, 64, 64))
    layout = spark3r.TokenLayout(
        frames, whole.height, whole.width, whole.special, anchor_frame=whole.anchor_frame
    )
    schedule = spark3r.paper_schedule("reference", 8, sensitive=REFERENCE_SENSITIVE)
    rules = schedule.resolve_within(layout)
    shard = Shard(layout, deal(frames, ranks, unit(rules)))
    return [received_bytes(shard, rule, WIDTH, 4) for rule in rules]


def measure(frames: int, counts: Sequence[int], passes: int) -> dict[str, Any]:
    """Return figures of a pass in one process and in each number of ranks."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, *counts):
            spawn(run_rank, (ranks, folder, frames, passes), nprocs=ranks)
            files = [Path(folder, f"{ranks}-{rank}.json") for rank in range(ranks)]
            runs.append(_summary([json.loads(file.read_text()) for file in files], frames))
    one = runs[0]
    for run in runs[1:]:
        ranks = run["ranks"]
        group_mb = one["memory_mb"] * 20 / frames
        run["cpu_ratio"] = round(run["cpu_s"] / one["cpu_s"], 3)
        run["wall_ratio"] = round(run["wall_s"] / one["wall_s"], 3)
        run["memory_bound_mb"] = round(LARGEST * one["memory_mb"] / ranks + group_mb, 1)
    return {"model": "reference", "frames": frames, "threads": 1, "runs": runs}


def _summary(ranks: Sequence[dict[str, Any]], frames: int) -> dict[str, Any]:
    def slowest(name: str) -> float:
        return round(max(statistics.median(each[name][1:]) for each in ranks), 3)

    count = len(ranks)
    sent = [(count - 1) * each for each in ranks[0]["sent_bytes"]]
    expected = predicted_bytes(frames, count) if count > 1 else []
    layers = [each for each in sent if each in expected]
    return {
        "ranks": count,
        "frames": [each["frames"] for each in ranks],
        "cpu_s": slowest("cpu_s"),
        "wall_s": slowest("wall_s"),
        "memory_mb": round(max(each["memory_mb"] for each in ranks), 1),
        "received_mb": round(sum(sent) / 1e6, 3),
        "layers_mb": [round(each / 1e6, 3) for each in layers],
        "bytes_as_predicted": layers == expected,
        "other_bytes": sum(sent) - sum(layers),
    }


def holds(result: dict[str, Any]) -> list[str]:
    """Return which bars are missed."""
    missed = []
    for run in result["runs"][1:]:
        if not run["bytes_as_predicted"]:
            missed.append(f"{run['ranks']} ranks do not receive what was predicted")
        if run["memory_mb"] > run["memory_bound_mb"]:
            missed.append(f"{run['ranks']} ranks need {run['memory_mb']} MB each")
        if run["ranks"] == 2 and run["cpu_ratio"] > SLOWEST:
            missed.append(f"two ranks take {run['cpu_ratio']} of the CPU time of one")
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=512, help="frames of the clip (default: 512)")
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks (default: 2,4)")
    parser.add_argument("--passes", type=int, default=5, help="timed passes (default: 5)")
    parser.add_argument("--output", type=Path, help="JSON file to write; by default it is printed")
    options = parser.parse_args(arguments)
    counts = [int(each) for each in options.ranks.split(",")]
    result = measure(options.frames, counts, options.passes)
    result["missed"] = holds(result)
    write_result(result, options.output)
    columns = ("ranks", "CPU s", "wall s", "memory MB", "received MB")
    print_markdown(
        columns,
        [
            [run["ranks"], run["cpu_s"], run["wall_s"], run["memory_mb"], run["received_mb"]]
            for run in result["runs"]
        ],
    )
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
