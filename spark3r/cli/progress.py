"""How much of a pass is done, counted in global layers without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class LayerProgress:
    """Counts the global layers that are done in a pass, and foretells when the last one will be.

    A GPU runs behind the host. There, an event is recorded after each layer, and a layer counts
    when its event has happened. Events are asked and never waited for. Inside a compiled graph
    nothing is counted.

    Args:
        total: Number of global layers of the pass.
        device: Device of the model.
        clock: Function that returns seconds.
    """

    def __init__(
        self, total: int, device: torch.device, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total = total
        self._device = device
        self._clock = clock
        self._pending: deque[torch.cuda.Event] = deque()
        self._times: list[float] = []

    @property
    def done(self) -> int:
        """Number of layers that are done."""
        while self._pending and self._pending[0].query():
            self._pending.popleft()
            self._times.append(self._clock())
        return len(self._times)

    @property
    def left_s(self) -> float | None:
        """Seconds until the last layer is done, None as long as fewer than two are."""
        done = self.done
        if done < 2:
            return None
        each = (self._times[-1] - self._times[0]) / (done - 1)
        return max(0.0, self._times[-1] + each * (self.total - done) - self._clock())

    def _count(self, module: nn.Module, args: object, output: object) -> None:
        """Count a layer (forward hook of a global attention module)."""
        if torch.compiler.is_compiling():
            return
        if self._device.type != "cuda":
            self._times.append(self._clock())
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._pending.append(event)


@contextmanager
def counted(modules: Collection[nn.Module], device: torch.device) -> Iterator[LayerProgress]:
    """Count the calls of modules inside the block, by hooks that are removed at its end.

    Args:
        modules: The global attention modules of the passes in the block.
        device: Device of the model.
    """
    progress = LayerProgress(len(modules), device)
    hooks = [module.register_forward_hook(progress._count) for module in modules]
    try:
        yield progress
    finally:
        for hook in hooks:
            hook.remove()
