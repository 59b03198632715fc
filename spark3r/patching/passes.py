"""Forward passes under way: the token layout and rules that a layer finds for its tokens."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from ..errors import LayoutError
from ..layout import TokenLayout
from ..reduction.rule import ResolvedRule
from ..reduction.sharding import ShardedLayout


@dataclass(frozen=True)
class Pass:
    """The data of a forward pass that its attention layers need.

    Attributes:
        layout: Token layout of the pass.
        rules: One resolved rule per global layer; empty without a schedule.
        shared: Token layout of this rank's frames, if several ranks share the clip.
    """

    layout: TokenLayout
    rules: tuple[ResolvedRule, ...]
    shared: ShardedLayout | None = None


class Passes:
    """The passes of one model, found by the shape of their hidden states.

    An attention layer knows the batch size and length of its input and nothing else of its pass, in
    whatever thread it runs, and also when gradient checkpointing runs it again. A second layout of
    the same shape is refused as long as a layer may still need the first.

    Args:
        usage: The supported ways to call the model, for error messages.
        entry: The module that every pass goes through.
    """

    def __init__(self, usage: str, entry: nn.Module) -> None:
        self._usage = usage
        self._entry = entry
        self._by_shape: dict[tuple[int, int], Pass] = {}
        self._running: dict[int, list[tuple[int, int]]] = {}  # by thread, the innermost last
        self._recorded: dict[tuple[int, int], int] = {}  # backward passes still to come
        self._traced: Pass | None = None
        self._lock = threading.Lock()

    def trace(self, begun: Pass) -> None:
        """Record the pass that a compiled graph begins."""
        # Tracing only writes this attribute. A read would add a guard, and the same length would
        # compile again.
        self._traced = begun

    def begin(self, batch: int, begun: Pass) -> None:
        """Record the pass that begins in this thread.

        Raises:
            LayoutError: If attention could not tell it from another pass that may still be needed.
        """
        shape = (batch, begun.layout.tokens)
        with self._lock:
            self._traced = None
            if self._mine:
                self._keep(calls_under_way(self._entry) - 1)
            known = self._by_shape.get(shape)
            if known is not None and known.layout != begun.layout:
                self._refuse_if_needed(known.layout, begun.layout, shape)
            self._by_shape[shape] = begun
            self._running.setdefault(threading.get_ident(), []).append(shape)

    def end(self, output: object) -> None:
        """Record that this thread's innermost pass is over, and keep it if gradients need it."""
        with self._lock:
            mine = self._mine
            if not mine:
                return
            shape = mine[-1]
            self._keep(len(mine) - 1)
            if torch.is_grad_enabled():
                self._await_backward(shape, output)

    def are_running(self) -> bool:
        """Return True if this thread is inside a pass."""
        with self._lock:
            self._keep(calls_under_way(self._entry))
            return bool(self._mine)

    def are_running_anywhere(self) -> bool:
        """Return True if some thread is inside a pass."""
        with self._lock:
            return any(self._running.values())

    @property
    def _mine(self) -> list[tuple[int, int]]:
        """Shapes of this thread's passes, the innermost last."""
        return self._running.get(threading.get_ident(), [])

    def _keep(self, outermost: int) -> None:
        """Forget passes of this thread but the outermost ones.

        A pass that Ctrl-C ends is not announced as over. It is known by the number of calls of the
        entry module that the thread is still inside of.
        """
        mine = self._mine[:outermost]
        if mine:
            self._running[threading.get_ident()] = mine
        else:
            self._running.pop(threading.get_ident(), None)

    def innermost(self) -> Pass | None:
        """Return the pass that this thread, or the graph that is being traced, is inside of."""
        if torch.compiler.is_compiling():
            return self._traced
        with self._lock:
            return self._by_shape[self._mine[-1]] if self._mine else None

    def current(self, hidden: Tensor) -> Pass:
        """Return the pass that hidden states ``[B, N, C]`` belong to.

        Raises:
            LayoutError: If no pass of this shape began.
        """
        batch, length = hidden.shape[0], hidden.shape[1]
        traced = self._traced
        if traced is not None and traced.layout.tokens == length:
            return traced
        found = self._by_shape.get((batch, length))
        if found is None:
            raise LayoutError(self._unknown(batch, length))
        return found

    def _await_backward(self, shape: tuple[int, int], output: object) -> None:
        """Keep the pass until a backward pass through its output is over."""
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self._recorded[shape] = self._recorded.get(shape, 0) + 1
                leaf.register_hook(_AtEndOfBackward(self, shape))
                return

    def _release(self, shape: tuple[int, int]) -> None:
        with self._lock:
            self._recorded[shape] = max(0, self._recorded.get(shape, 0) - 1)

    def _refuse_if_needed(
        self, known: TokenLayout, begun: TokenLayout, shape: tuple[int, int]
    ) -> None:
        if any(shape in mine for mine in self._running.values()):
            why, remedy = "is still running", "run them one after the other"
        elif self._recorded.get(shape):
            why = "has a backward pass to come, which may run attention again"
            remedy = "run that first, or run clips without gradients under torch.no_grad()"
        else:
            return
        raise LayoutError(
            f"a clip of {known.frames} frames of {known.height}x{known.width} patches {why}, and "
            f"this one of {begun.frames} frames of {begun.height}x{begun.width} has as many tokens "
            f"({shape[1]}), so that attention cannot tell them apart: {remedy}"
        )

    def _unknown(self, batch: int, length: int) -> str:
        if self._mine:
            announced = self._mine[-1]
            return (
                f"global attention was given {length} tokens (batch {batch}) in a pass of "
                f"{announced[1]} (batch {announced[0]}): the family's token counts do not "
                "fit this model, or one of its global attention modules is not one"
            )
        return (
            f"global attention was given {length} tokens (batch {batch}) of no announced pass: the "
            "schedule was applied while the pass was under way, or the call went past the model's "
            f"entry module. Call the model so that its entry module runs: {self._usage}"
        )


def calls_under_way(module: nn.Module) -> int:
    """Return the number of calls of a module that this thread is inside of."""
    count = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            count += 1
        frame = frame.f_back
    return count


@dataclass(frozen=True)
class _AtEndOfBackward:
    """A tensor hook that releases a pass when the whole backward pass is over."""

    passes: Passes
    shape: tuple[int, int]

    def __call__(self, gradient: Tensor) -> None:
        engine: Any = Variable._execution_engine
        engine.queue_callback(lambda: self.passes._release(self.shape))
