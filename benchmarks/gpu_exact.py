"""The stage of a GPU run that looks for differences and for waits in whole passes."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from gpu_kernels import KERNELS, preferring
from gpu_session import Session, at_any_length, own_us, schedules
from torch import Tensor, nn

import spark3r
from spark3r import Schedule, TokenLayout
from spark3r.kernels import forced, grouped_attention, nearest, norm_rope
from spark3r.patching.apply import replace_attention, verify
from spark3r.patching.patch import Patch
from spark3r.reduction.rule import ResolvedRule
from spark3r.runner import Runner

PLAIN = {
    grouped_attention.OPERATION: grouped_attention.MASK,
    norm_rope.OPERATION: norm_rope.PLAIN,
    nearest.OPERATION: nearest.PLAIN,
}


def exact(session: Session) -> None:
    runner, put = session.runner(), session.lines.put
    images = session.clip(runner, session.frames(40, 20))
    with session.lines.guarded("guard"):
        verify(runner, images)
        put("guard", agrees=True)
    for kernel in ("default", *KERNELS) if session.on_cuda else ("default",):
        with session.lines.guarded("ones", kernel=kernel), preferring(kernel):
            for row in _ones(runner, images):
                put("ones", kernel=kernel, **row)
    long, thousand = schedules(runner, session.tiny), session.frames(1000, 20)
    reduced = {name: at_any_length(each, thousand) for name, each in long.items()}
    for name, schedule in reduced.items():
        with session.lines.guarded("passes", schedule=name):
            _reduced(session, runner, name, schedule, images)
    if session.on_cuda:
        with (
            session.lines.guarded("profile"),
            _applying(runner, reduced["paper"])(),
        ):
            put("profile", frames=len(images), kernels=_profile(runner, images))


def _reduced(
    session: Session, runner: Runner, name: str, schedule: Schedule, images: Tensor
) -> None:
    """Write differences and waits of passes under a schedule."""
    lines, apply = session.lines, _applying(runner, schedule)
    with apply():
        first = tensors(runner, images)
        lines.put(
            "passes",
            schedule=name,
            twice=differences(tensors(runner, images), first),
            finite=all(bool(value.isfinite().all()) for value in first.values()),
        )
        lines.put("waits", schedule=name, places=_waits(session, runner, images))
        for operation, plain in PLAIN.items():
            what = {"schedule": name, "operation": operation}
            with lines.guarded("plain twin", **what):
                with forced(operation, plain):
                    found = tensors(runner, images)
                lines.put("plain twin", **what, difference=differences(first, found))
    with (
        lines.guarded("saver", schedule=name),
        apply(save_memory=False),
    ):
        lines.put("saver", schedule=name, difference=differences(first, tensors(runner, images)))


def _applying(runner: Runner, schedule: Schedule) -> Callable[..., Patch]:
    """Return the function that applies a schedule without comparing the first pass."""
    return partial(spark3r.apply, runner.model, schedule, family=runner.family, guard=False)


def tensors(runner: Runner, images: Tensor) -> dict[str, Tensor]:
    """Return the tensors of the model's output for images ``[S, 3, H, W]``."""
    output = runner.run(images)
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the largest difference of each output relative to its largest value."""
    return {
        name: float((found[name] - value).abs().max()) / (float(value.abs().max()) or 1.0)
        for name, value in expected.items()
        if value.is_floating_point()
    }


def _ones(runner: Runner, images: Tensor) -> list[dict[str, Any]]:
    """Return the difference of factors 1 from the model itself, in four ways."""
    dense = tensors(runner, images)
    apply = _applying(runner, Schedule.dense(runner.depth))
    rows = [{"how": "the model twice", "difference": differences(tensors(runner, images), dense)}]
    patches: dict[str, Callable[[], Patch]] = {
        "applied": partial(apply, save_memory=False),
        "applied, with the memory saver": apply,
        "forced through our path": partial(_forced_path, runner),
    }
    for how, patch in patches.items():
        # Our fused kernel rounds otherwise, so it does not run at factors of 1.
        with patch(), forced(norm_rope.OPERATION, norm_rope.PLAIN):
            found = tensors(runner, images)
        rows.append({"how": how, "difference": differences(found, dense)})
    return rows


def _forced_path(runner: Runner) -> Patch:
    """Return a patch under which all layers, frame blocks too, run our path with factors 1."""
    rule = ResolvedRule()

    def forward(attn: nn.Module, layout: TokenLayout, *args: Any, **kwargs: Any) -> Tensor:
        return runner.family.reduced_forward(attn, layout, rule, *args, **kwargs)

    return replace_attention(runner, forward)


def _waits(session: Session, runner: Runner, images: Tensor) -> list[str] | None:
    """Return the places at which a pass waits for the device; None without a GPU.

    Upstream's own copies to the device are among them, so the places say whose they are.
    """
    if not session.on_cuda:
        return None
    places: list[str] = []

    def note(message: object, *_: object, **__: object) -> None:
        if "synchroniz" in str(message):
            stack = traceback.extract_stack()[:-1]
            own = [f"{each.filename.rpartition('/')[2]}:{each.lineno}" for each in stack[-8:]]
            places.append(" > ".join(own))

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            runner.run(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sorted(set(places))


def _profile(runner: Runner, images: Tensor) -> list[dict[str, Any]]:
    """Return the kernels that took the most time in a pass."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        runner.run(images)
    events = sorted(found.key_averages(), key=own_us, reverse=True)[:40]
    return [
        {"kernel": each.key[:120], "ms": round(own_us(each) / 1000, 3), "calls": each.count}
        for each in events
    ]
