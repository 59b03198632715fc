"""A benchmark of a model's speed: dense, the wall, schedules and FastVGGT's merging side by side.

`bench` is the function behind ``spark3r bench`` and the committed figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date

import torch
from torch import nn

from ..env import device_name, environment
from ..errors import FamilyError
from ..families.base import Family
from ..patching.apply import verify
from ..runner import HALF, Runner, dtype_name, dtype_of
from ..timing import MIN_ROUNDS, Timer
from .backends import AUTO, FASTEST, fastest_backend, sdpa_backend
from .measure import measure_side_by_side
from .result import Benchmark, Row, modelled_ms, modelled_row, rows_of
from .treatments import treatments

GRID = (28, 37)
"""Rows and columns of patches of a frame in the paper: 518x392 pixels in patches of 14."""

REFERENCE_GRID = (8, 8)
"""Rows and columns of patches of the clips that the reference model was trained on."""


def bench(
    model: nn.Module,
    frames: Sequence[int],
    schedules: Sequence[str],
    *,
    name: str | None = None,
    grid: tuple[int, int] | None = None,
    sensitive: Sequence[int] | None = None,
    backend: str = AUTO,
    dtype: torch.dtype | None = None,
    dense_up_to: int | None = None,
    once_from: int | None = None,
    rounds: int = MIN_ROUNDS,
    cpu_time: bool = False,
    seed: int = 0,
    family: Family | str | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Benchmark:
    """Measure a model on random clips of several lengths under several treatments.

    At each length all treatments are measured in turns. A treatment that runs out of memory is left
    out.

    Args:
        model: The model on its device, with parameters in their precision; unpatched before and
            after.
        frames: Lengths in frames.
        schedules: Names of treatments, see `spark3r.benchmark.treatments.ACCEPTED`.
        name: Name of the model in the result; None takes its class.
        grid: Rows and columns of patches of a frame; None takes the paper's, or the reference
            model's.
        sensitive: Sensitive layers of ``paper``, counted from 0; None takes the paper's.
        backend: Kernel of scaled dot-product attention, one of
            `spark3r.benchmark.backends.BACKENDS`.
        dtype: Autocast precision of every pass, as VGGT, π³ and Depth-Anything-3 run with
            parameters in float32; None leaves autocast as it is.
        dense_up_to: Length beyond which ``dense`` is not measured but modelled from the two longest
            lengths at which it is; None measures it everywhere.
        once_from: Length from which on ``dense`` and ``fastvggt`` run a single time; None for none.
        rounds: Samples of each treatment, default 3.
        cpu_time: True counts the time that the process computes, summed over its threads, instead
            of the time that passes. It allows comparisons on a CPU that other processes keep busy.
        seed: Seed of the random images, default 0.
        family: The model's family or the name of one; None recognises it.
        progress: Callback(message).

    Raises:
        FamilyError: If the model is of no known family, or the family does not say the size of a
            patch.
        ScheduleError: If a treatment is unknown or does not fit.
        PatchError: If the model only looks like one of its family, see `spark3r.apply`.
    """
    runner = Runner.of(model, family, dtype)
    device = runner.device
    own = dtype_of(model)
    chosen = treatments(schedules, runner, sensitive)
    if grid is None:
        grid = REFERENCE_GRID if runner.family.name == "reference" else GRID
    size = _image_size(runner, grid)
    generator = torch.Generator().manual_seed(seed)
    lengths = sorted(set(frames))
    timer = Timer(time.process_time if cpu_time else time.perf_counter, rounds)

    backend_ms: dict[str, float] = {}
    if backend == FASTEST:
        backend, backend_ms = fastest_backend(runner, torch.zeros(lengths[0], 3, *size))
        progress(f"fastest attention kernel: {backend}")

    rows: list[Row] = []
    with sdpa_backend(backend):
        for length in lengths:
            images = torch.rand(length, 3, *size, generator=generator).to(device, own)
            if length == lengths[0]:
                verify(runner, images)
            tokens = runner.layout(images).tokens
            once = once_from is not None and length >= once_from
            too_long = dense_up_to is not None and length > dense_up_to
            measured = measure_side_by_side(
                runner,
                images,
                {name: chosen[name] for name in chosen if not (too_long and name == "dense")},
                once=("dense", "fastvggt") if once else (),
                timer=timer,
                progress=progress,
            )
            found = rows_of(length, tokens, measured)
            if too_long and "dense" in chosen:
                found = _with_modelled(found, rows, length, tokens)
            rows += found
    return Benchmark(
        model=type(runner.root).__name__ if name is None else name,
        grid=grid,
        device=device_name(device),
        dtype=_precision(own, dtype),
        backend=backend,
        backend_ms=backend_ms,
        clock="process" if cpu_time else "wall",
        seed=seed,
        rows=tuple(rows),
        environment=environment(),
        date=date.today().isoformat(),
    )


def _image_size(runner: Runner, grid: tuple[int, int]) -> tuple[int, int]:
    """Return height and width in pixels of frames with this grid of patches."""
    patch = runner.family.metadata(runner.root).get("patch_size")
    if patch is None:
        raise FamilyError(
            f"family '{runner.family.name}' does not say how large a patch is, so that no images "
            "can be made: give generic() patch_size= instead of layout="
        )
    return grid[0] * patch, grid[1] * patch


def _with_modelled(found: list[Row], earlier: Sequence[Row], frames: int, tokens: int) -> list[Row]:
    """Add dense as modelled from earlier lengths, and the speed-ups over it."""
    points = [(row.frames, row.ms) for row in earlier if row.schedule == "dense" and row.n]
    if len(points) < 2:
        return found
    ms = modelled_ms(points, frames)
    compared = [replace(row, speed_up=ms / row.ms) for row in found]
    return [modelled_row(frames, tokens, ms, found), *compared]


def _precision(own: torch.dtype, dtype: torch.dtype | None) -> str:
    return dtype_name(own) + (f", autocast {dtype_name(dtype)}" if dtype in HALF else "")
