"""What a pass may hold at once: sizes of pieces, and what waits in the host's memory.

`limited` sets the limits for the passes of its block, in its thread. The defaults are what passes
hold anywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """Limits of a pass. All of them leave outputs as they are, but for rounding in a dense head.

    Attributes:
        frames: Largest number of frames of a piece of a block; None for the usual one.
        head_frames: Largest number of frames that a dense head takes together. None for the
            head's own default. Its convolutions may round differently in other pieces.
        features_on_host: True keeps what a dense head reads in the host's memory until it is read.
        outputs_on_host: True moves a dense head's outputs to the host's memory piece by piece.
    """

    frames: int | None = None
    head_frames: int | None = None
    features_on_host: bool = False
    outputs_on_host: bool = False


NONE = Limits()
_CURRENT: ContextVar[Limits] = ContextVar("limits", default=NONE)


def current() -> Limits:
    """Return the limits of passes of this thread; none in a graph that is traced."""
    return NONE if torch.compiler.is_compiling() else _CURRENT.get()


@contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Limit the passes of the block."""
    token = _CURRENT.set(limits)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def kept_features(made: Tensor) -> Tensor:
    """Return what a dense head reads later, in the place where it waits."""
    return made.to("cpu") if current().features_on_host else made


def read_features(kept: Tensor, device: torch.device) -> Tensor:
    """Return what waited on the model's device."""
    if kept.device.type == "meta" and current().features_on_host:
        # There is no other device from which it could be copied.
        return torch.empty(kept.shape, dtype=kept.dtype, device="meta")
    return kept.to(device)


def kept_output(made: Tensor) -> Tensor:
    """Return a part of an output in the place where outputs are."""
    return made.to("cpu") if current().outputs_on_host else made
