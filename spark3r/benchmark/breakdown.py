"""Where the time of a pass goes, and the attention products it computes.

A pass of its own, apart from the timed ones: hooks on modules and functions note which part runs,
and a clock charges every moment to the innermost. On a device other than the CPU each change of
part waits for the device, which costs some overlap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families.base import Family, unwrap
from ..families.registry import detect
from ..reduction import merging, unmerging
from ..runner import device_of
from ..sdpa import ReplaceSDPA
from ..timing import Clock
from . import fastvggt

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
"""``global projections``: of global attention what is in no other part: projections, norms, rotary
embedding. ``frame attention``: every other attention of the trunk. ``other``: norms, residuals."""

_ENCODERS = ("patch_embed", "encoder")

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        ms: Milliseconds by part.
        products: Shapes of query, key and value of every attention product of the global layers,
            in their order.
        biased: Whether those products had a bias.
        dtypes: Of their queries.
    """

    ms: dict[str, float]
    products: tuple[Shapes, ...]
    biased: tuple[bool, ...]
    dtypes: tuple[torch.dtype, ...]


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
        # What runs inside the encoder and the heads is theirs, whatever it is.
        self.stack.append(self.stack[-1] if self.stack[-1] in ("encoder", "heads") else part)

    def leave(self) -> None:
        self.charge()
        self.stack.pop()


class _Products:
    """Charges the products of global attention to ``attention``, and notes their shapes."""

    def __init__(self, meter: _Meter) -> None:
        self.meter = meter
        self.shapes: list[Shapes] = []
        self.biased: list[bool] = []
        self.dtypes: list[torch.dtype] = []

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.meter.stack[-1] != "global projections":
            return F.scaled_dot_product_attention(*args, **kwargs)
        query, key, value = args[:3]
        self.shapes.append((tuple(query.shape), tuple(key.shape), tuple(value.shape)))
        self.biased.append(kwargs.get("attn_mask") is not None)
        self.dtypes.append(query.dtype)
        return _charged(F.scaled_dot_product_attention, "attention", self.meter)(*args, **kwargs)


def record(
    model: nn.Module,
    images: Tensor,
    family: Family | None = None,
    clock: Clock = time.perf_counter,
) -> PassRecord:
    """Run a pass and return where its time went.

    Args:
        model: The model, with whatever is applied to it.
        images: ``[S, 3, H, W]`` on the model's device.
        family: What is known of the model; None recognises it.
        clock: Seconds.
    """
    root = unwrap(model)
    family = detect(root) if family is None else family
    device = device_of(model)
    wait = (lambda: None) if device.type == "cpu" else getattr(torch, device.type).synchronize
    meter = _Meter(wait, clock)
    with ExitStack() as stack:
        for module, part in _modules(root, family):
            stack.enter_context(_hooked(module, part, meter))
        for home, name, part in (
            (merging, "match", "matching"),
            (merging, "merge", "merging"),
            (merging, "unmerge", "merging"),
            (unmerging, "unmerge", "merging"),
            (fastvggt, "joint_places", "matching"),
        ):
            charged = _charged(getattr(home, name), part, meter)
            stack.enter_context(patch.object(home, name, charged))
        products = _Products(meter)
        stack.enter_context(ReplaceSDPA(products.attend))
        with torch.inference_mode():
            wait()
            meter.since = clock()
            model(images[None])
            meter.charge()
    return PassRecord(
        meter.ms, tuple(products.shapes), tuple(products.biased), tuple(products.dtypes)
    )


def _modules(root: nn.Module, family: Family) -> Iterator[tuple[nn.Module, str]]:
    entry, attention = family.entry(root), set(family.attention(root).values())
    for child in root.children():
        if all(module is not entry for module in child.modules()):
            yield child, "heads"
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


def _charged(function: Callable[..., Any], part: str, meter: _Meter) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        meter.enter(part)
        try:
            return function(*args, **kwargs)
        finally:
            meter.leave()

    return call
