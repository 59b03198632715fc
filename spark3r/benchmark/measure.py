"""Measuring treatments of a model side by side: latency in turns, peak memory, parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory import fits_into_memory, peak_extra_mb
from ..patching.apply import remove
from ..runner import Runner
from ..timing import TIMER, Latency, Timer, Treatment
from .breakdown import PassBreakdown, SDPACall, profile_pass
from .treatments import Apply


@dataclass(frozen=True)
class TreatmentResult:
    """Measurements of one treatment at one length.

    Attributes:
        latency: Latency of whole passes.
        bare: Latency of the attention calls of its global layers alone, at the same lengths on
            random numbers, timed in the same turns; None where there are none.
        peak_mb: Rise of memory in a pass, MB; None where it cannot be measured.
        breakdown: Where the time of a pass goes.
    """

    latency: Latency
    bare: Latency | None
    peak_mb: float | None
    breakdown: PassBreakdown


def measure_side_by_side(
    runner: Runner,
    images: Tensor,
    treatments: Mapping[str, Apply],
    *,
    once: Collection[str] = (),
    timer: Timer = TIMER,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, TreatmentResult]:
    """Measure treatments of a model on one clip, in turns.

    Args:
        runner: An unpatched model; it is unpatched again afterwards.
        images: ``[S, 3, H, W]`` on the model's device.
        treatments: The treatments by name. One that runs out of memory is left out.
        once: Names of treatments that run a single time, which gives their whole result.
        timer: The timer of the latencies.
        progress: Callback(message).
    """
    device = runner.device
    peaks: dict[str, float | None] = {}
    breakdowns: dict[str, PassBreakdown] = {}

    def first_pass(name: str) -> None:
        def call() -> None:
            breakdowns[name] = profile_pass(runner, images, timer.clock)

        peaks[name] = peak_extra_mb(call, device)

    for name, apply in treatments.items():
        progress(f"{len(images)} frames, {name}: memory and parts")
        with apply():
            fits_into_memory(lambda name=name: first_pass(name), device)  # type: ignore[misc]
    timed: list[Treatment] = []
    for name, breakdown in breakdowns.items():
        if name not in once:
            timed.append(Treatment(name, lambda: runner.run(images), treatments[name], name))
        if breakdown.calls and name not in ("dense", "wall"):
            bare = f"bare {name}"
            timed.append(Treatment(bare, bare_attention(breakdown.calls, device), subject=bare))
    try:
        latencies = timer.time_in_turns(
            timed,
            device=device,
            warmed_up=True,
            progress=lambda done, total: progress(
                f"{len(images)} frames: {done} of {total} timed runs"
            ),
        )
    finally:
        remove(runner.model)
    return {
        name: TreatmentResult(
            latencies[name] if name in latencies else Latency((sum(breakdown.ms.values()),)),
            latencies.get(f"bare {name}"),
            peaks[name],
            breakdown,
        )
        for name, breakdown in breakdowns.items()
    }


def bare_attention(calls: tuple[SDPACall, ...], device: torch.device) -> Callable[[], None]:
    """Return a function that computes attention calls one after the other on random numbers.

    Calls of equal shapes share their numbers. A bias is replaced by zeros, which cost as much.
    """

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    tensors = {
        (each.query, each.key, each.value, each.dtype): tuple(
            random(shape, each.dtype) for shape in (each.query, each.key, each.value)
        )
        for each in calls
    }

    def compute() -> None:
        with torch.inference_mode():
            for each in calls:
                query, key, value = tensors[each.query, each.key, each.value, each.dtype]
                bias = key.new_zeros(1, 1, 1, key.shape[2]) if each.has_bias else None
                F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    return compute
