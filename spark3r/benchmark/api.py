"""Measuring a model's speed side by side: dense, at the wall, under schedules and a peer.

`bench` is one function behind ``spark3r bench`` and the committed figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import date

import torch
from torch import nn

from ..env import device_name, environment
from ..families.base import Family, unwrap
from ..families.registry import detect
from ..runner import device_of, layout_of
from ..timing import MIN_ROUNDS
from .backends import AUTO, BACKENDS, FASTEST, fastest_backend, sdpa_backend
from .fastvggt import apply_fastvggt
from .measure import measure_side_by_side
from .result import Benchmark, Row, modelled_ms, modelled_row, rows_of
from .treatments import ACCEPTED, treatments

__all__ = [
    "ACCEPTED",
    "AUTO",
    "BACKENDS",
    "Benchmark",
    "Row",
    "apply_fastvggt",
    "bench",
]

GRID = (28, 37)
"""Patches of a frame as in the paper, 518x392 pixels in patches of 14."""

REFERENCE_GRID = (8, 8)
"""Those of the clips that the reference model was trained on."""


def bench(
    model: nn.Module,
    frames: Sequence[int],
    schedules: Sequence[str],
    *,
    name: str | None = None,
    grid: tuple[int, int] | None = None,
    sensitive: Sequence[int] | None = None,
    backend: str = AUTO,
    autocast: torch.dtype | None = None,
    dense_up_to: int | None = None,
    once_from: int | None = None,
    rounds: int = MIN_ROUNDS,
    limit_s: float | None = None,
    cpu_time: bool = False,
    seed: int = 0,
    family: Family | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Benchmark:
    """Measure a model on random clips of several lengths under several treatments.

    At each length all treatments are measured in turns. What does not fit into memory is left out.

    Args:
        model: The model, on its device and in its precision; unpatched before and after.
        frames: Lengths, in frames.
        schedules: Treatments by name, see `ACCEPTED`.
        name: What to call the model; None takes its class.
        grid: Rows and columns of patches of a frame; None takes the paper's, or the reference
            model's.
        sensitive: Sensitive layers of ``paper``, counted from 0.
        backend: Kernel of scaled dot-product attention, see `BACKENDS`.
        autocast: Precision of `torch.autocast` around every pass, as VGGT, π³ and
            Depth-Anything-3 run with parameters in float32; None for none.
        dense_up_to: Beyond this length ``dense`` is not measured but modelled from the two longest
            lengths at which it is; None measures it everywhere.
        once_from: From this length on ``dense`` and ``fastvggt`` run a single time.
        rounds: Samples of each treatment.
        limit_s: Start no further round after so many seconds at one length, though at least three.
        cpu_time: Count the time that the process itself computes, summed over its threads, and not
            the time that passes: what to compare on a CPU that others keep busy.
        seed: Of the random images.
        family: What is known of the model; None recognises it.
        progress: Told what is being done.

    Raises:
        FamilyError: If the model is of no known family.
        ScheduleError: If a treatment is unknown or does not fit.
    """
    root = unwrap(model)
    family = detect(root) if family is None else family
    device = device_of(model)
    dtype = next(model.parameters()).dtype
    chosen = treatments(schedules, model, family, sensitive)
    if grid is None:
        grid = REFERENCE_GRID if family.name == "reference" else GRID
    patch = family.facts(root)["patch_size"]
    generator = torch.Generator().manual_seed(seed)
    lengths = sorted(set(frames))

    backend_ms: dict[str, float] = {}
    if backend == FASTEST:
        images = torch.zeros(lengths[0], 3, grid[0] * patch, grid[1] * patch)
        attn = next(iter(family.attention(root).values()))
        heads, width = _heads_and_width(attn)
        tokens = layout_of(model, images, family).tokens
        backend, backend_ms = fastest_backend(
            heads, tokens, width // heads, device, dtype if autocast is None else autocast
        )
        progress(f"fastest attention kernel: {backend}")

    rows: list[Row] = []
    with ExitStack() as stack:
        stack.enter_context(sdpa_backend(backend))
        if autocast is not None:
            stack.enter_context(torch.autocast(device.type, dtype=autocast))
        for length in lengths:
            images = torch.rand(
                length, 3, grid[0] * patch, grid[1] * patch, generator=generator
            ).to(device, dtype)
            tokens = layout_of(model, images, family).tokens
            once = once_from is not None and length >= once_from
            too_long = dense_up_to is not None and length > dense_up_to
            measured = measure_side_by_side(
                model,
                images,
                [each for each in chosen if not (too_long and each.name == "dense")],
                family=family,
                once=("dense", "fastvggt") if once else (),
                rounds=rounds,
                limit_s=limit_s,
                clock=time.process_time if cpu_time else time.perf_counter,
                progress=progress,
            )
            found = rows_of(length, tokens, measured)
            if too_long and any(each.name == "dense" for each in chosen):
                found = _with_modelled(found, rows, length, tokens)
            rows += found
    return Benchmark(
        model=type(root).__name__ if name is None else name,
        grid=grid,
        device=device_name(device),
        dtype=_precision(dtype, autocast),
        backend=backend,
        backend_ms=backend_ms,
        clock="process" if cpu_time else "wall",
        seed=seed,
        rows=tuple(rows),
        environment=environment(),
        date=date.today().isoformat(),
    )


def _with_modelled(found: list[Row], earlier: Sequence[Row], frames: int, tokens: int) -> list[Row]:
    """Add dense as modelled from earlier lengths, and the speed-ups over it."""
    points = [(row.frames, row.ms) for row in earlier if row.schedule == "dense" and row.n]
    if len(points) < 2:
        return found
    ms = modelled_ms(points, frames)
    compared = [replace(row, speed_up=ms / row.ms) for row in found]
    return [modelled_row(frames, tokens, ms, found), *compared]


def _precision(dtype: torch.dtype, autocast: torch.dtype | None) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if autocast is None else f"{name}, autocast {str(autocast).removeprefix('torch.')}"


def _heads_and_width(attn: nn.Module) -> tuple[int, int]:
    heads = attn.num_heads
    projection = attn.proj
    assert isinstance(heads, int)
    assert isinstance(projection, nn.Linear)
    return heads, projection.in_features
