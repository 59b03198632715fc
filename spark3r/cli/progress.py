"""How much of a pass is done, counted in global layers without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class LayerProgress:
    """Counts the global layers that are done in a pass, and foretells when the pass will be.

    A GPU runs behind the host. There, an event is recorded after each layer, and a layer counts
    when its event has happened. Events are asked and never waited for. Inside a compiled graph
    nothing is counted.

    The heads follow the last layer. In an earlier pass they took a certain multiple of what came
    before the first layer (the encoder), and both grow with the number of frames.

    Args:
        total: Number of global layers of the pass.
        device: Device of the model.
        earlier: Progress of an earlier pass of the model, at any length; None without one.
        clock: Function that returns seconds.
    """

    def __init__(
        self,
        total: int,
        device: torch.device,
        earlier: LayerProgress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self._device = device
        self._earlier = earlier
        self._clock = clock
        self._pending: deque[torch.cuda.Event] = deque()
        self._times: list[float] = []
        self._begin = clock()
        self._end: float | None = None

    @property
    def done(self) -> int:
        """Number of layers that are done."""
        while self._pending and self._pending[0].query():
            self._pending.popleft()
            self._times.append(self._clock())
        return len(self._times)

    @property
    def left_s(self) -> float | None:
        """Seconds until the pass is done, None as long as fewer than two layers are.

        Without an earlier pass the heads do not count.
        """
        done = self.done
        if done < 2:
            return None
        each = (self._times[-1] - self._times[0]) / (done - 1)
        heads = 0.0
        if self._earlier is not None and (share := self._earlier._heads_share) is not None:
            heads = share * (self._times[0] - self._begin)
        end = self._times[-1] + each * (self.total - done) + heads
        return max(0.0, end - self._clock())

    @property
    def _heads_share(self) -> float | None:
        """Duration of the heads ÷ duration up to the first layer, of a pass that is over."""
        if self._end is None or len(self._times) < self.total or not self._times:
            return None
        before = self._times[0] - self._begin
        return (self._end - self._times[-1]) / before if before > 0 else None

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

    def _finish(self) -> None:
        """Note that the pass is over."""
        if self.done:
            self._end = self._clock()


@contextmanager
def counted(
    modules: Collection[nn.Module],
    device: torch.device,
    earlier: LayerProgress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[LayerProgress]:
    """Count the calls of modules in a pass inside the block, by hooks that it removes again.

    Args:
        modules: The global attention modules of the pass.
        device: Device of the model.
        earlier: Progress of an earlier pass of the model, to foretell the heads' duration by.
        clock: Function that returns seconds.
    """
    progress = LayerProgress(len(modules), device, earlier, clock)
    hooks = [module.register_forward_hook(progress._count) for module in modules]
    try:
        yield progress
        progress._finish()
    finally:
        for hook in hooks:
            hook.remove()
