"""Where the time of a pass goes, and the attention that its global layers compute.

A profiled pass is not a timed one: hooks on modules and an observer of the reduction's steps note
which part runs, and a clock charges every moment to the innermost part. On a device other than the
CPU each change of part waits for the device, which costs some overlap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reduction.steps import observed
from ..runner import Runner
from ..sdpa import ReplaceSDPA
from ..timing import Clock

PARTS = (
    "encoder",
    "frame attention",
    "global projections",
    "matching",
    "merging",
    "attention",
    "MLP",
    "heads",
    "other",
)
"""``global projections``: the rest of global attention: projections, norms, rotary embedding.
``frame attention``: every other attention of the trunk. ``merging``: unmerging too. ``heads``:
children of the model that are no part of the encoder or the trunk. ``other``: norms, residuals."""

_ENCODERS = ("patch_embed", "encoder")
_PART_OF_STEP = {
    "matching": "matching",
    "merging": "merging",
    "attention": "attention",
    "unmerging": "merging",
}


@dataclass(frozen=True)
class SDPACall:
    """One call of scaled dot-product attention.

    Attributes:
        query: Shape of the queries, ``[B, H, N, D]``.
        key: Shape of the keys, ``[B, H, M, D]``.
        value: Shape of the values, ``[B, H, M, D]``.
        dtype: Precision of the queries.
        has_bias: True if a bias was added to the logits by a mask.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtype: torch.dtype
    has_bias: bool


@dataclass(frozen=True)
class PassBreakdown:
    """Parts and attention of one pass.

    Attributes:
        ms: Milliseconds by part, see `PARTS`.
        calls: Calls of scaled dot-product attention in the global layers, in their order.
    """

    ms: dict[str, float]
    calls: tuple[SDPACall, ...]


@dataclass
class _Meter:
    """Charges time to the part on top of a stack."""

    wait: Callable[[], object]
    clock: Clock
    ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    stack: list[str] = field(default_factory=lambda: ["other"])
    since: float = 0.0

    def charge(self) -> None:
        self.wait()
        now = self.clock()
        self.ms[self.stack[-1]] += 1000 * (now - self.since)
        self.since = now

    def enter(self, part: str) -> None:
        self.charge()
        # Everything inside the encoder and the heads belongs to them.
        self.stack.append(self.stack[-1] if self.stack[-1] in ("encoder", "heads") else part)

    def leave(self) -> None:
        self.charge()
        self.stack.pop()

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        self.enter(part)
        try:
            yield
        finally:
            self.leave()


def profile_pass(runner: Runner, images: Tensor, clock: Clock = time.perf_counter) -> PassBreakdown:
    """Run a pass and return where its time went.

    Args:
        runner: The model, with or without a schedule or patch.
        images: ``[S, 3, H, W]`` on the model's device.
        clock: Function that returns seconds.
    """
    device = runner.device
    wait = (lambda: None) if device.type == "cpu" else getattr(torch, device.type).synchronize
    meter = _Meter(wait, clock)
    calls: list[SDPACall] = []

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        if meter.stack[-1] != "global projections":
            return F.scaled_dot_product_attention(*args, **kwargs)
        calls.append(_seen(*args, **kwargs))
        with meter.inside("attention"):
            return F.scaled_dot_product_attention(*args, **kwargs)

    def observe(step: str, args: tuple[Any, ...]) -> AbstractContextManager[None]:
        if step == "attention":  # by a kernel of its own, without a mask
            calls.append(_seen(*args[:3]))
        return meter.inside(_PART_OF_STEP[step])

    with ExitStack() as stack:
        for module, part in _modules(runner):
            stack.enter_context(_hooked(module, part, meter))
        stack.enter_context(observed(observe))
        stack.enter_context(ReplaceSDPA(attend))
        wait()
        meter.since = clock()
        runner.run(images)
        meter.charge()
    return PassBreakdown(meter.ms, tuple(calls))


def _seen(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: object = None, *_: Any, **__: Any
) -> SDPACall:
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    return SDPACall(*shapes, query.dtype, attn_mask is not None)


def _modules(runner: Runner) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules whose time is a part of its own, outer ones first."""
    entry = runner.family.entry(runner.root)
    attention = set(runner.attention.values())
    trunk = {
        module
        for child in runner.root.children()
        if any(each is entry or each in attention for each in child.modules())
        for module in child.modules()
    }
    for name, child in runner.root.named_children():
        if child not in trunk:  # a rotary embedding, say, is shared with the trunk's attention
            yield child, "encoder" if name in _ENCODERS else "heads"
    for name, module in entry.named_modules():
        last = name.rpartition(".")[2]
        if module in attention:
            yield module, "global projections"
        elif last in _ENCODERS:
            yield module, "encoder"
        elif last == "attn":
            yield module, "frame attention"
        elif last == "mlp":
            yield module, "MLP"


@contextmanager
def _hooked(module: nn.Module, part: str, meter: _Meter) -> Iterator[None]:
    before = module.register_forward_pre_hook(lambda *_: meter.enter(part))
    after = module.register_forward_hook(lambda *_: meter.leave())
    try:
        yield
    finally:
        before.remove()
        after.remove()
