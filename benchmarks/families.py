"""Every family at its real size with random weights: exactness, the paper's schedule, time, memory.

    python benchmarks/families.py --output families.json            # one GPU, bfloat16, 100 frames
    python benchmarks/families.py --tiny --models DA3-Small         # a CPU, to see that it runs

For each model this script checks whether a schedule with all factors 1 changes a bit of the output,
as applied and when it is forced through spark3r's own path, under every attention backend of the
device. Then it times the paper's schedule against dense and the wall, and measures peak memory. A
failure is recorded with its reason, and the script continues.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results_io import write_result
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import spark3r
from spark3r import Schedule, TokenLayout, load_model, load_profile
from spark3r.memory import peak_extra_mb
from spark3r.patching.apply import replace_attention
from spark3r.patching.patch import Patch
from spark3r.patching.wall import apply_wall
from spark3r.reduction.rule import ResolvedRule
from spark3r.runner import Runner
from spark3r.timing import Timer, Treatment

# Name for --model, profile, and image size after the model's own preprocessing of 4:3 footage.
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


def tensors(runner: Runner, images: Tensor) -> dict[str, Tensor]:
    """Return the tensors of the model's output for images ``[S, 3, H, W]``."""
    output = runner.run(images)
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def random_images(frames: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """Return random images ``[S, 3, H, W]``."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(frames, 3, *size, generator=generator).to(device)


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest difference of any output relative to its largest value."""
    worst = 0.0
    for name, value in expected.items():
        scale = float(value.abs().max()) or 1.0
        worst = max(worst, float((found[name] - value).abs().max()) / scale)
    return worst


def forced(runner: Runner) -> Patch:
    """Return a patch under which layers run spark3r's own path with factors 1."""
    dense = ResolvedRule()

    def forward(attn: nn.Module, layout: TokenLayout, *args: Any, **kwargs: Any) -> Tensor:
        return runner.family.reduced_forward(attn, layout, dense, *args, **kwargs)

    return replace_attention(runner, forward)


def guarded(what: Callable[[], Any]) -> Any:
    """Return the result of a call, or the reason of its failure."""
    try:
        return what()
    except (RuntimeError, spark3r.Spark3rError) as error:
        return f"failed: {str(error).splitlines()[0]}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def exactness(runner: Runner, ones: Schedule, images: Tensor, backend: SDPBackend | None) -> Any:
    """Return the difference of factors 1 from dense, as applied and forced through our path."""
    # Flash attention does not support heads in float32, which fall back to math.
    allowed = nullcontext() if backend is None else sdpa_kernel([backend, SDPBackend.MATH])
    with allowed:
        dense = tensors(runner, images)
        with spark3r.apply(runner.model, ones):
            applied = difference(tensors(runner, images), dense)
        with forced(runner):
            ours = difference(tensors(runner, images), dense)
    return {"applied": applied, "forced": ours}


def speed(runner: Runner, schedule: Schedule, images: Tensor, rounds: int) -> Any:
    """Return median latency (ms) and peak memory (MB) of dense, the wall and the schedule."""
    model, device = runner.model, runner.device
    ones = Schedule.dense(len(schedule.layers))
    prepare: dict[str, Callable[[], object]] = {
        "dense": lambda: spark3r.remove(model),
        "dense with saver": lambda: spark3r.apply(model, ones),
        "wall": lambda: apply_wall(runner),
        "reduced": lambda: spark3r.apply(model, schedule),
    }

    def call() -> object:
        return runner.run(images)

    try:
        found = Timer(rounds=rounds, warm_up_s=0.01).time_in_turns(
            [Treatment(name, call, apply, name) for name, apply in prepare.items()], device=device
        )
        peaks = {}
        for name, apply in prepare.items():
            apply()
            peaks[name] = peak_extra_mb(call, device)
        prepare["reduced"]()
        finite = all(bool(value.isfinite().all()) for value in tensors(runner, images).values())
    finally:
        spark3r.remove(model)
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
    model: Any = load_model(model_name, device)
    if hasattr(model, "disable_multimodal"):
        model.disable_multimodal()
    runner = Runner.of(model, dtype=getattr(torch, arguments.dtype))
    layers = runner.depth
    ones = Schedule.dense(layers)
    schedule = (
        Schedule.uniform(layers, 2, 4) if profile is None else load_profile(profile).schedule()
    )
    lengths = (arguments.exact_frames, arguments.frames)
    short, long = (random_images(frames, size, device) for frames in lengths)
    backends = BACKENDS if device.type == "cuda" else {"default": None}
    return {
        "model": name,
        "profile": profile or "uniform 2 / 4",
        "frames": arguments.frames,
        "image": size,
        "dtype": arguments.dtype,
        "ones": {
            f"{arguments.exact_frames} frames": {
                backend: guarded(partial(exactness, runner, ones, short, chosen))
                for backend, chosen in backends.items()
            },
            f"{arguments.frames} frames": guarded(partial(exactness, runner, ones, long, None)),
        },
        "speed": guarded(partial(speed, runner, schedule, long, arguments.rounds)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all"
    )
    parser.add_argument("--frames", type=int, default=100, help="for speed (default: 100)")
    parser.add_argument("--exact-frames", type=int, default=8, help="for exactness (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each (default: 5)")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("float32", "bfloat16", "float16"),
        help="autocast (default: bfloat16)",
    )
    parser.add_argument("--tiny", action="store_true", help="the same on a CPU, with small sizes")
    parser.add_argument("--output", type=Path, help="JSON file to write; by default it is printed")
    arguments = parser.parse_args()
    arguments.size = None
    if arguments.tiny:
        arguments.frames, arguments.exact_frames, arguments.rounds = 20, 3, 1
        arguments.dtype, arguments.size = "float32", (56, 70)
    elif not torch.cuda.is_available():
        parser.error("no CUDA device was found; --tiny runs the same on a CPU, with small sizes")
    device = torch.device("cpu" if arguments.tiny else "cuda")
    warnings.simplefilter("ignore")  # warnings of upstream code
    rows = []
    for name in arguments.models:
        row = guarded(partial(examine, name, arguments, device))
        rows.append(row if isinstance(row, dict) else {"model": name, "result": row})
        print(json.dumps(rows[-1]), file=sys.stderr)
    write_result({"rows": rows}, arguments.output)


if __name__ == "__main__":
    main()
