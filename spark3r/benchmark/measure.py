"""Measuring treatments of a model side by side: latency in turns, peak memory, parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families.base import Family
from ..memory import is_out_of_memory, peak_extra_mb
from ..patching.handle import Patch
from ..runner import device_of, run
from ..timing import Call, Clock, Latency, interleaved
from .breakdown import PassRecord, record
from .treatments import Treatment


@dataclass(frozen=True)
class Measurement:
    """One treatment at one length.

    Attributes:
        latency: Of whole passes.
        bare: Of the attention products of its global layers alone, at the same lengths on random
            numbers, in the same turns; None where there are none.
        peak_mb: How far memory rises in a pass, in MB; None where it cannot be measured.
        record: Where the time goes.
    """

    latency: Latency
    bare: Latency | None
    peak_mb: float | None
    record: PassRecord


def measure_side_by_side(
    model: nn.Module,
    images: Tensor,
    treatments: Sequence[Treatment],
    *,
    family: Family | None = None,
    once: Collection[str] = (),
    rounds: int = 5,
    limit_s: float | None = None,
    clock: Clock = time.perf_counter,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Measurement]:
    """Measure treatments of a model on one clip, in turns.

    Args:
        model: An unpatched model; it is unpatched again afterwards.
        images: ``[S, 3, H, W]`` on the model's device.
        treatments: What to measure. Those that do not fit into memory are left out.
        family: What is known of the model; None recognises it.
        once: Names of treatments that run a single time, which gives all that is said of them.
        rounds: Samples of each other one, in so many rounds.
        limit_s: Start no further round after so many seconds and three rounds; None for no limit.
        clock: Seconds; not used for latencies on a CUDA device.
        progress: Told what is being done.
    """
    device = device_of(model)
    by_name = {treatment.name: treatment for treatment in treatments}

    def one_pass() -> object:
        return run(model, images)

    peaks: dict[str, float | None] = {}
    records: dict[str, PassRecord] = {}
    for name, treatment in by_name.items():
        progress(f"{len(images)} frames, {name}: memory and parts")
        with treatment.put_on(model):
            try:
                peaks[name], records[name] = _first_pass(model, images, family, clock)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    calls: dict[str, Call] = {}
    for name, pass_record in records.items():
        if name not in once:
            calls[name] = one_pass
        if pass_record.products and name not in ("dense", "wall"):
            calls[f"bare {name}"] = bare_attention(pass_record, device)

    applied: list[Patch] = []

    def before(name: str) -> None:
        while applied:
            applied.pop().remove()
        if name in by_name:
            progress(f"{len(images)} frames, {name}")
            applied.append(by_name[name].put_on(model))

    try:
        # Measuring memory has warmed every pass up.
        timed = interleaved(
            calls,
            before=before,
            device=device,
            rounds=rounds,
            warm_up_s=0,
            limit_s=limit_s,
            clock=clock,
        )
    finally:
        before("")
    return {
        name: Measurement(
            timed[name] if name in timed else Latency((sum(pass_record.ms.values()),)),
            timed.get(f"bare {name}"),
            peaks[name],
            pass_record,
        )
        for name, pass_record in records.items()
    }


def _first_pass(
    model: nn.Module, images: Tensor, family: Family | None, clock: Clock
) -> tuple[float | None, PassRecord]:
    seen: list[PassRecord] = []

    def call() -> None:
        seen.append(record(model, images, family, clock))

    peak_mb = peak_extra_mb(call, device_of(model))
    return peak_mb, seen[0]


def bare_attention(seen: PassRecord, device: torch.device) -> Call:
    """Return a call that computes the products of a pass, one after the other, on random numbers.

    Equal shapes share their numbers. A bias counts as the bias of zeros that it costs as much as.
    """
    chosen = list(zip(seen.products, seen.dtypes, seen.biased, strict=True))
    tensors = {
        (shapes, dtype): [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        for shapes, dtype, _ in chosen
    }

    def call() -> None:
        with torch.inference_mode():
            for shapes, dtype, has_bias in chosen:
                query, key, value = tensors[shapes, dtype]
                bias = key.new_zeros(1, 1, 1, key.shape[2]) if has_bias else None
                F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    return call
