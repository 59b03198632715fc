"""What the check of the first pass costs, as a share of a dense pass of the same clip.

    SPARK3R_UPSTREAM=... python benchmarks/guard.py --output benchmarks/results/guard.json

The reference model is timed on one thread of the CPU: dense passes, and first passes under a
schedule, in turns. Time inside of the guard is divided by that of the dense pass before it. Models
of the real size are not run. Their arithmetic is counted on shapes alone (matrix products,
convolutions, attention), of the guard and of a dense pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results_io import print_markdown, write_result
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import spark3r
from spark3r import Schedule, load_model
from spark3r.loading.architecture import load_architecture
from spark3r.meta import autocast_followed, on_meta
from spark3r.patching.guard import Guard
from spark3r.runner import Runner, evaluation_mode

REAL = {
    "VGGT-1B": ("vggt:random", (392, 518)),
    "Pi3": ("pi3:random-pi3", (434, 574)),
    "DA3-Small": ("da3:random-small", (378, 504)),
    "DA3-Large": ("da3:random-large", (378, 504)),
    "DA3-Giant": ("da3:random-giant", (378, 504)),
    "VGGT-Omega-1B": ("omega:random", (448, 592)),
    "MapAnything": ("mapanything:random", (392, 518)),
    "WorldMirror-2": ("worldmirror:random-2", (392, 518)),
    "PanoVGGT": ("panovggt:random", (518, 1036)),
}
"""Models, and image sizes after their own preprocessing of 4:3 footage, or of panoramas."""


class _Float32:
    """A pass whose precision stays as it is."""

    half: torch.dtype | None = None

    def forget_casts(self) -> None:
        """Forget nothing."""


class Timed(Guard):
    """A guard that adds up its CPU time."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def begin(self, *args: Any) -> None:
        """Begin as the guard does."""
        return self._timed(super().begin, *args)

    def see(self, *args: Any) -> None:
        """Compare as the guard does."""
        return self._timed(super().see, *args)

    def end(self, *args: Any, **kwargs: Any) -> bool:
        """End as the guard does."""
        return self._timed(super().end, *args, **kwargs)

    def _timed(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begun = time.thread_time()
        try:
            return step(*args, **kwargs)
        finally:
            self.seconds += time.thread_time() - begun


def timed(frames: int, rounds: int) -> dict[str, Any]:
    """Return the guard's share of the CPU time of a dense pass of the reference model."""
    runner = Runner.of(load_model("reference"))
    clip = torch.rand(frames, 3, 64, 64)
    schedule = Schedule.uniform(runner.depth, 2, 4)
    shares, dense = [], []
    for measured in [False] + [True] * rounds:
        begun = time.thread_time()
        runner.run(clip)
        seconds = time.thread_time() - begun
        with spark3r.apply(runner.model, schedule) as handle:
            handle._guard = guard = Timed()
            runner.run(clip)
        assert len(guard.compared) == runner.depth
        if measured:
            shares.append(guard.seconds / seconds)
            dense.append(seconds)
    return {
        "model": "reference",
        "frames": frames,
        "rounds": rounds,
        "share": statistics.median(shares),
        "quartiles": statistics.quantiles(shares)[::2],
        "dense_s": statistics.median(dense),
    }


def counted(name: str, frames: int) -> dict[str, Any]:
    """Return the arithmetic of the guard and of a dense pass, in units of 10¹² operations."""
    source, size = REAL[name]
    runner = Runner.of(on_meta(load_architecture(source)).requires_grad_(False))
    root, family = runner.root, runner.family
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    schedule = Schedule.dense(runner.depth)  # upstream's rotary embedding reads values without it
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        evaluation_mode(root),
        torch.device("meta"),
        autocast_followed(_Float32()),
        spark3r.apply(root, schedule, family=family, guard=False) as handle,
    ):
        warnings.simplefilter("ignore")
        entry = family.entry(root)
        hooks = [
            module.register_forward_pre_hook(
                lambda module, args, kwargs: calls.update({module: (args, kwargs)}),
                with_kwargs=True,
            )
            for module in (entry, *runner.attention.values())
        ]
        with FlopCounterMode(display=False) as whole:
            family.call(root, torch.empty(frames, 3, *size))
        for hook in hooks:
            hook.remove()
        args, kwargs = calls[entry]
        layout = family.layout(entry, args, kwargs)[1]
        handle._guard = guard = Guard()
        with FlopCounterMode(display=False) as order:
            guard.begin(family, entry, args, kwargs, layout)
        with FlopCounterMode(display=False) as layers:
            for layer, module in runner.attention.items():
                guard.see(family, layer, module, layout, *calls[module])
    parts = (whole, order, layers)
    dense, of_order, of_layers = (part.get_total_flops() / 1e12 for part in parts)
    return {
        "model": name,
        "frames": frames,
        "image": size,
        "dense": dense,
        "order": of_order,
        "layers": of_layers,
        "share": (of_order + of_layers) / dense,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=32, help="length of the clips (default: 32)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds to time (default: 15)")
    parser.add_argument(
        "--models", nargs="*", choices=REAL, default=list(REAL), help="to count (default: all)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write; by default it is printed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = timed(options.frames, options.rounds)
    rows = [counted(name, options.frames) for name in options.models]
    low, high = measured["quartiles"]
    print(
        f"reference, {options.frames} frames: {measured['share']:.2%} of a dense pass "
        f"(quartiles {low:.2%} to {high:.2%}; dense {measured['dense_s']:.2f} s)\n"
    )
    columns = ("model", "dense, 10¹²", "order", "layers", "share")
    print_markdown(
        columns,
        [
            (
                row["model"],
                f"{row['dense']:.0f}",
                f"{row['order']:.2f}",
                f"{row['layers']:.3f}",
                f"{row['share']:.2%}",
            )
            for row in rows
        ],
    )
    write_result({"timed": measured, "counted": rows}, options.output)


if __name__ == "__main__":
    main()
