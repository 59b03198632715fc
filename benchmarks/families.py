"""Every family at its real size with random weights: exactness, the paper's schedule, time, memory.

    python benchmarks/families.py --output families.json            # one GPU, bfloat16, 100 frames
    python benchmarks/families.py --tiny --models DA3-Small         # a CPU, to see that it runs

For each model: whether a schedule of ones changes a bit, as it is and forced through spark3r's own
path, under every attention backend that the device has; then the paper's schedule, timed against
dense and the wall, with peak memory. What fails is recorded with its reason, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from results_io import write_result
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import spark3r
from spark3r import Schedule
from spark3r.loading.load import load_model
from spark3r.memory import peak_extra_mb
from spark3r.patching.wall import apply_wall
from spark3r.profile import load_profile
from spark3r.reduction.rule import ResolvedRule
from spark3r.runner import Runner
from spark3r.timing import interleaved

# Name for --model, profile, and the image that the model's own preprocessing makes of 4:3 footage.
MODELS = {
    "VGGT-1B": ("vggt:random", "vggt-1b", (392, 518)),
    "Pi3": ("pi3:random-pi3", "pi3", (434, 574)),
    "Pi3X": ("pi3:random-pi3x", "pi3x", (434, 574)),
    "DA3-Small": ("da3:random-small", None, (378, 504)),
    "DA3-Large": ("da3:random-large", "da3-large", (378, 504)),
    "DA3-Giant": ("da3:random-giant", "da3-giant", (378, 504)),
    "VGGT-Omega-1B": ("omega:random", "vggt-omega-1b", (448, 592)),
}
BACKENDS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


class Runs:
    """One model on one device, run under autocast as its users run it."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype

    def __call__(self, clip: Tensor) -> dict[str, Tensor]:
        """Return the tensors that the model predicts."""
        low = self.dtype != torch.float32
        cast = torch.autocast(self.device.type, self.dtype) if low else nullcontext()
        with torch.no_grad(), cast:
            output = self.model(clip)
        return {name: value for name, value in output.items() if isinstance(value, Tensor)}

    def clip(self, frames: int, size: tuple[int, int]) -> Tensor:
        """Return a random clip ``[1, S, 3, H, W]``."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(1, frames, 3, *size, generator=generator).to(self.device)


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest difference of any output, relative to its largest value."""
    worst = 0.0
    for name, value in expected.items():
        scale = float(value.abs().max()) or 1.0
        worst = max(worst, float((found[name] - value).abs().max()) / scale)
    return worst


@contextmanager
def forced() -> Iterator[None]:
    """Send layers with factors of 1 through spark3r's own path too."""
    with patch.object(ResolvedRule, "is_dense", property(lambda rule: False)):
        yield


def guarded(what: Callable[[], Any]) -> Any:
    """Return a result, or why there is none."""
    try:
        return what()
    except (RuntimeError, spark3r.Spark3rError) as error:
        return f"failed: {str(error).splitlines()[0]}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def exactness(runs: Runs, ones: Schedule, clip: Tensor, backend: SDPBackend | None) -> Any:
    """Return how far factors of 1 are from dense: as applied, and forced through our path."""
    # Heads in float32 have no flash attention: they fall back to math.
    allowed = nullcontext() if backend is None else sdpa_kernel([backend, SDPBackend.MATH])
    with allowed:
        dense = runs(clip)
        with spark3r.apply(runs.model, ones):
            applied = difference(runs(clip), dense)
            with forced():
                ours = difference(runs(clip), dense)
    return {"applied": applied, "forced": ours}


def speed(runs: Runs, schedule: Schedule, clip: Tensor, rounds: int) -> Any:
    """Return median latency and peak memory of dense, wall and the schedule, in ms and MB."""

    def prepare(name: str) -> None:
        spark3r.remove(runs.model)
        if name == "wall":
            apply_wall(Runner.of(runs.model))
        elif name != "dense":
            applied = schedule if name == "reduced" else ones
            spark3r.apply(runs.model, applied)

    ones = Schedule.dense(len(schedule.layers))
    names = ("dense", "dense with saver", "wall", "reduced")
    calls = dict.fromkeys(names, lambda: runs(clip))
    try:
        found = interleaved(
            calls, before=prepare, device=runs.device, rounds=rounds, warm_up_s=0.01
        )
        peaks = {}
        for name in names:
            prepare(name)
            peaks[name] = peak_extra_mb(lambda: runs(clip), runs.device)
        prepare("reduced")
        finite = all(bool(value.isfinite().all()) for value in runs(clip).values())
    finally:
        spark3r.remove(runs.model)
    return {
        "ms": {
            name: {"median": latency.median_ms, "spread": latency.spread_ms, "n": latency.n}
            for name, latency in found.items()
        },
        "peak_mb": peaks,
        "finite": finite,
    }


def examine(name: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    model_name, profile, size = MODELS[name]
    size = arguments.size or size
    model = load_model(model_name, device)
    if hasattr(model, "disable_multimodal"):
        model.disable_multimodal()
    runs = Runs(model, device, getattr(torch, arguments.dtype))
    layers = len(spark3r.families.detect(model).attention(model))
    ones = Schedule.dense(layers)
    schedule = (
        Schedule.uniform(layers, 2, 4) if profile is None else load_profile(profile).schedule()
    )
    short, long = (runs.clip(n, size) for n in (arguments.exact_frames, arguments.frames))
    backends = BACKENDS if device.type == "cuda" else {"default": None}
    return {
        "model": name,
        "profile": profile or "uniform 2 / 4",
        "frames": arguments.frames,
        "image": size,
        "dtype": arguments.dtype,
        "ones": {
            f"{arguments.exact_frames} frames": {
                backend: guarded(lambda chosen=chosen: exactness(runs, ones, short, chosen))
                for backend, chosen in backends.items()
            },
            f"{arguments.frames} frames": guarded(lambda: exactness(runs, ones, long, None)),
        },
        "speed": guarded(lambda: speed(runs, schedule, long, arguments.rounds)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--exact-frames", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tiny", action="store_true", help="the same on a CPU, in small")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.size = None
    if arguments.tiny:
        arguments.frames, arguments.exact_frames, arguments.rounds = 20, 3, 1
        arguments.dtype, arguments.size = "float32", (56, 70)
    elif not torch.cuda.is_available():
        parser.error("no CUDA device is there: --tiny runs the same in small on a CPU")
    device = torch.device("cpu" if arguments.tiny else "cuda")
    warnings.simplefilter("ignore")  # upstream's own
    rows = []
    for name in arguments.models:
        row = guarded(lambda name=name: examine(name, arguments, device))
        rows.append(row if isinstance(row, dict) else {"model": name, "result": row})
        print(json.dumps(rows[-1]), file=sys.stderr)
    write_result({"rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
