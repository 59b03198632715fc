"""Stages of a GPU run that time whole passes, and count the memory that they should need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from gpu_kernels import preferring
from gpu_session import Session, attention_kernel, promised_frames, schedules
from past_the_wall import steps
from torch import Tensor

import spark3r
from spark3r import Schedule
from spark3r.families.parts import memory as pieces
from spark3r.loading.architecture import load_architecture
from spark3r.memory import peak_bytes, reset_peak
from spark3r.memory_count import count_memory
from spark3r.patching.wall import apply_wall
from spark3r.runner import Runner, autocast
from spark3r.timing import make_stopwatch

Treatment = Callable[[], AbstractContextManager[object]]

CARD_GB, CONTEXT_GB = 24, 0.5
"""A card whose limit is imitated, and what the CUDA context takes of it."""

LONG_FRAMES = (1500, 2000)
MOST_WITHOUT_SAVER = 300
"""Frames. Upstream keeps all layers of VGGT, which is 204 MB a frame."""

DENSE_KERNELS = ("default", "cudnn", "flash")
NO_SAVER = "paper, without the memory saver"


def treatments(runner: Runner, tiny: bool) -> dict[str, Treatment]:
    """Return what a pass can run under, by name, with the family's memory saver but for one."""
    chosen = schedules(runner, tiny)
    apply = partial(spark3r.apply, runner.model, family=runner.family, guard=False)
    return {
        **{name: partial(apply, schedule) for name, schedule in chosen.items()},
        "wall": partial(apply_wall, runner),
        "dense": partial(apply, Schedule.dense(runner.depth)),
        NO_SAVER: partial(apply, chosen["paper"], save_memory=False),
    }


def speed(session: Session) -> None:
    runner = session.runner()
    chosen = treatments(runner, session.tiny)
    images = session.clip(runner, session.frames(1000, 24))
    every: dict[str, Treatment] = {name: chosen[name] for name in ("paper", "wall", "mass")}
    slowest = _rounds(session, runner, images, every, 2)
    others: dict[str, tuple[Treatment, Callable[[Tensor], object]]] = {
        "paper, all heads": (chosen["paper"], partial(_whole, runner)),
    }
    for frames in (4, 64):
        some = partial(_pieces, chosen["wall"], frames)
        others[f"wall, pieces of {frames} frames"] = some, runner.run
    for name, (treatment, run) in others.items():
        if session.left_s > slowest:
            _sample(session, name, images, treatment, run)
    while session.left_s > 1.5 * len(every) * slowest and not session.tiny:
        _rounds(session, runner, images, every, 1)


def dense(session: Session) -> None:
    runner = session.runner()
    chosen = treatments(runner, session.tiny)
    every = {name: chosen[name] for name in ("wall", "paper", NO_SAVER)}
    known: tuple[int, float] | None = None
    ran: dict[str, str | None] = {}  # seen at the first length; torch does not choose by length
    for frames in (10, 14) if session.tiny else (100, 300, 500):
        first = known is None
        images = session.clip(runner, frames)
        if frames > MOST_WITHOUT_SAVER:
            del every[NO_SAVER]
        _rounds(session, runner, images, every, 2 if first else 1)
        if known is not None:
            needed = known[1] * (frames / known[0]) ** 2
            if needed > session.left_s:
                reason = f"it needs {needed:.0f} s, and {session.left_s:.0f} s are left"
                session.lines.put("pass", what="dense", frames=frames, left_out=reason)
                continue
        begin = time.monotonic()
        for kernel in DENSE_KERNELS if first and session.on_cuda else ("default",):
            treatment = partial(_by_kernel, chosen["dense"], kernel)
            if first:  # warms up, too
                with session.lines.guarded("pass", what="dense", kernel=kernel), treatment():
                    ran[kernel] = attention_kernel(partial(runner.run, images), session.on_cuda)
                begin = time.monotonic()
            name = ran.get(kernel)
            _sample(session, "dense", images, treatment, runner.run, kernel=kernel, ran=name)
            if kernel == "default":
                known = frames, time.monotonic() - begin


def past(session: Session) -> None:
    runner = session.runner()
    paper = treatments(runner, session.tiny)["paper"]
    images = session.clip(runner, session.frames(500, 24))
    backend = "inductor" if session.on_cuda else "eager"
    every, missing = steps(runner, backend=backend)
    for name, reason in missing.items():
        session.lines.put("past", step=name, missing=reason)
    order: dict[str, Callable[[], AbstractContextManager[None]]] = {"as it is": nullcontext}
    order |= {name: every[name] for name in ("head", "compiled", "merged") if name in every}
    for name, step in order.items():
        with session.lines.guarded("past", step=name), paper(), step():
            watch = make_stopwatch(session.device)
            cold_ms = watch(lambda: runner.run(images))
            graphs = _graphs() if name == "compiled" else None
            session.lines.put("past", step=name, cold_ms=round(cold_ms, 1), graphs=graphs)
            ms = watch(lambda: runner.run(images))
            session.lines.put("past", step=name, frames=len(images), ms=round(ms, 1))


def _graphs() -> int:
    """Return the number of graphs that the compiler made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def long(session: Session) -> None:
    runner = session.runner()
    paper = treatments(runner, session.tiny)["paper"]
    frames = 12 if session.tiny else promised_frames(CARD_GB)
    if runner.family.name == "vggt":
        with session.lines.guarded("card", card_gb=CARD_GB, frames=frames):
            with _card(session):
                images = session.clip(runner, frames)
                row = _measured(session, images, paper, runner.run)
            session.lines.put("card", card_gb=CARD_GB, frames=frames, **row)
    for frames in (30,) if session.tiny else LONG_FRAMES:
        images = session.clip(runner, frames)
        _sample(session, "paper", images, paper, runner.run)


def count(session: Session) -> None:
    """Count the memory of the passes above, on any machine."""
    runner = session.runner() if session.tiny else Runner.of(load_architecture(session.name))
    lengths = (24,) if session.tiny else (1000, promised_frames(CARD_GB), *LONG_FRAMES)
    chosen = schedules(runner, session.tiny)
    for frames in lengths:
        shape = session.clip(runner, frames, on_device=False).shape
        for name in ("paper", "mass") if frames == lengths[0] else ("paper",):
            with session.lines.guarded("count", what=name, frames=frames):
                found = count_memory(
                    runner.root,
                    frames,
                    (shape[2], shape[3]),
                    schedule=chosen[name],
                    dtype=torch.bfloat16,
                    family=runner.family,
                )
                session.lines.put(
                    "count",
                    what=name,
                    frames=frames,
                    total_gb=round(found.total / 1e9, 3),
                    extra_gb=round(found.extra / 1e9, 3),
                    parts=found.parts,
                    where=found.where,
                )


def _rounds(
    session: Session,
    runner: Runner,
    images: Tensor,
    every: Mapping[str, Treatment],
    rounds: int,
) -> float:
    """Sample treatments in turns, and return the seconds of the slowest pass."""
    slowest = 0.0
    for _ in range(rounds):
        for name, treatment in every.items():
            begin = time.monotonic()
            _sample(session, name, images, treatment, runner.run)
            slowest = max(slowest, time.monotonic() - begin)
    return slowest


def _sample(
    session: Session,
    name: str,
    images: Tensor,
    treatment: Treatment,
    run: Callable[[Tensor], object],
    **extra: Any,
) -> None:
    """Run one pass under a treatment, and write its time and memory."""
    what = {"what": name, "frames": len(images), **extra}
    with session.lines.guarded("pass", **what):
        session.lines.put("pass", **what, **_measured(session, images, treatment, run))


def _measured(
    session: Session, images: Tensor, treatment: Treatment, run: Callable[[Tensor], object]
) -> dict[str, Any]:
    """Return milliseconds of a pass, and GB at its peak with weights and images."""
    with treatment():
        before = reset_peak(session.device)
        ms = make_stopwatch(session.device)(lambda: run(images))
        peak = peak_bytes(session.device)
    row: dict[str, Any] = {"ms": round(ms, 1)}
    if session.on_cuda:
        assert before is not None
        assert peak is not None
        row["peak_gb"] = round(peak / 1e9, 3)
        row["extra_gb"] = round((peak - before) / 1e9, 3)
        row["reserved_gb"] = round(torch.cuda.max_memory_reserved(session.device) / 1e9, 3)
    return row


def _whole(runner: Runner, images: Tensor) -> object:
    """Run a pass with every head, as a user's own call does."""
    with torch.inference_mode(), autocast(runner.device, runner.dtype):
        return runner.family.call(runner.model, images)


@contextmanager
def _by_kernel(treatment: Treatment, kernel: str) -> Iterator[None]:
    with treatment(), preferring(kernel):
        yield


@contextmanager
def _pieces(treatment: Treatment, frames: int) -> Iterator[None]:
    """Let the memory saver run so many frames at a time."""
    before = pieces.MOST_FRAMES, pieces.MOST_TOKENS
    pieces.MOST_FRAMES, pieces.MOST_TOKENS = frames, 1024 * frames
    try:
        with treatment():
            yield
    finally:
        pieces.MOST_FRAMES, pieces.MOST_TOKENS = before


@contextmanager
def _card(session: Session) -> Iterator[None]:
    """Limit the memory of this process to that of a smaller card."""
    if not session.on_cuda:
        yield
        return
    torch.cuda.empty_cache()
    memory = torch.cuda.get_device_properties(session.device).total_memory
    share = 1e9 * (CARD_GB - CONTEXT_GB) / memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), session.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, session.device)
