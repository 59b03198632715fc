"""A schedule on a live model: what it puts on the modules, and how it takes it off again.

Only instances are touched: each global attention module gets a bound ``forward`` and a note of
its place in the schedule, the family's entry module gets a pre-hook that derives the token layout
of the pass. No module is wrapped, no class is changed, and ``state_dict`` keys stay as they are.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LayoutError, Spark3rWarning
from .families import Family
from .layout import TokenLayout
from .reduction import clamp
from .schedule import LayerRule, Schedule

HANDLE = "_spark3r_handle"  # on the root module
PLACE = "_spark3r_place"  # on each global attention module


@dataclass(frozen=True)
class Pass:
    """What the attention layers must know of a forward pass.

    Attributes:
        layout: Token layout of the pass.
        rules: One resolved rule per global layer, within what the layout allows.
        recorded: Whether a backward pass may ask for it again (gradient checkpointing).
    """

    layout: TokenLayout
    rules: tuple[LayerRule, ...]
    recorded: bool = False


class Handle:
    """A schedule on a model: prints its layers, pauses, and takes it off again.

    Made by `apply`. As a context manager it removes itself at the end.

    Attributes:
        family: Family of the model.
        schedule: What is applied.
        layers: Qualified names of the global attention modules.
        grids: Patch grids (rows, columns) that the schedule was measured on; empty when unknown.
        saves_memory: Whether the family's lossless memory saver comes with it.
    """

    def __init__(
        self,
        root: nn.Module,
        family: Family,
        schedule: Schedule,
        grids: frozenset[tuple[int, int]] = frozenset(),
        saves_memory: bool = True,
    ) -> None:
        self.family = family
        self.schedule = schedule
        self.grids = grids
        self.saves_memory = saves_memory
        self._root = root
        self._modules = family.attention(root)
        self._entry = family.entry(root)
        self.layers = tuple(self._modules)
        self._undo: list[_Undo] = []
        self._enabled = True
        self._traced: Pass | None = None
        self._forget()

    def _forget(self) -> None:
        self._passes: dict[tuple[int, int], Pass] = {}
        self._running: list[tuple[int, tuple[int, int]]] = []  # (thread, key), innermost last
        self._resolved: dict[TokenLayout, tuple[LayerRule, ...]] = {}
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        passing = ("_passes", "_running", "_resolved", "_warned", "_lock", "_traced")
        return {key: value for key, value in self.__dict__.items() if key not in passing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._traced = None
        self._forget()

    @property
    def is_active(self) -> bool:
        """Whether the model still carries this schedule."""
        return bool(self._undo)

    def remove(self) -> None:
        """Take the schedule off: the model is as it was, bit for bit. Does nothing twice."""
        while self._undo:
            self._undo.pop().run()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the model dense inside the block, in every thread."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __str__(self) -> str:
        state = "" if self.is_active else " (removed)"
        width = max(len(name) for name in self.layers)
        lines = [
            f"spark3r on {type(self._root).__name__}{state}: family {self.family.name}, "
            f"{len(self.layers)} global layers, length rule {self.schedule.length.mode}",
            f"{'layer':<{width}}  query  key-value  operators",
        ]
        for name, rule in zip(self.layers, self.schedule.layers, strict=True):
            operators = rule.operators or self.schedule.operators
            lines.append(
                f"{name:<{width}}  {rule.query:>5}  {rule.key_value:>9}  "
                f"{operators.query}({operators.group}), {operators.key_value}"
            )
        return "\n".join(lines)

    def install(self) -> None:
        """Patch every module, or none."""
        try:
            self._set(self._root, HANDLE, self)
            hook = self._entry.register_forward_pre_hook(self._open, with_kwargs=True)
            self._undo.append(_Undo(hook.remove))
            hook = self._entry.register_forward_hook(self._close, always_call=True)
            self._undo.append(_Undo(hook.remove))
            for index, module in enumerate(self._modules.values()):
                self._set(module, PLACE, _Place(self, index, module.__dict__.get("forward")))
                self._set(module, "forward", MethodType(_forward, module))
            for module, name, value in self.family.saver(self._root) if self.saves_memory else ():
                self._set(module, name, value)
        except BaseException:
            self.remove()
            raise

    def _set(self, module: nn.Module, name: str, value: object) -> None:
        before = module.__dict__.get(name, _ABSENT)
        self._undo.append(_Undo(_restore, (module, name, before)))
        module.__dict__[name] = value

    def _open(self, entry: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the layout of the pass that begins (pre-hook of the entry module)."""
        if not self._enabled:
            return
        batch, layout = self.family.layout(entry, args, kwargs)
        key = (batch, layout.tokens)
        if torch.compiler.is_compiling():
            # Written, never read before: no guard, so that a clip length compiles once.
            self._traced = Pass(layout, self._resolve(layout))
            return
        recorded = torch.is_grad_enabled() and self._root.training
        with self._lock:
            self._traced = None
            known = self._passes.get(key)
            if known is not None and known.layout != layout:
                self._refuse_if_needed(known, key, layout)
            rules = self._resolved.get(layout)
            if rules is None:
                rules = self._resolved[layout] = self._resolve(layout)
                self._warn(layout, rules)
            self._passes[key] = Pass(layout, rules, recorded)
            self._running.append((threading.get_ident(), key))

    def _close(self, entry: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Note that this thread's innermost pass is over (forward hook of the entry module)."""
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        with self._lock:
            for index in range(len(self._running) - 1, -1, -1):
                if self._running[index][0] == thread:
                    del self._running[index]
                    return

    def _resolve(self, layout: TokenLayout) -> tuple[LayerRule, ...]:
        return tuple(clamp(rule, layout) for rule in self.schedule.resolve(layout.frames))

    def _refuse_if_needed(self, known: Pass, key: tuple[int, int], layout: TokenLayout) -> None:
        running = any(open_key == key for _, open_key in self._running)
        if not running and not known.recorded:
            return
        why = "is still running" if running else "may still be recomputed for its gradients"
        raise LayoutError(
            f"a clip of {known.layout.frames} frames of {known.layout.height}x"
            f"{known.layout.width} patches {why}, and this one of {layout.frames} frames of "
            f"{layout.height}x{layout.width} has as many tokens ({key[1]}), so that attention "
            "cannot tell them apart: run them one after the other, or in two copies of the model"
        )

    def _warn(self, layout: TokenLayout, rules: tuple[LayerRule, ...]) -> None:
        asked = self.schedule.resolve(layout.frames)
        if any(
            a.query > b.query or a.key_value > b.key_value
            for a, b in zip(asked, rules, strict=True)
        ):
            self._warn_once(
                "clamped",
                f"some factors are larger than a clip of {layout.frames} frames of "
                f"{layout.height}x{layout.width} patches allows; the largest possible are used",
            )
        longest = self.schedule.length.max_frames
        if longest is not None and layout.frames > longest:
            self._warn_once(
                "length",
                f"a clip of {layout.frames} frames is longer than the {longest} that the schedule "
                "was measured up to; its factors are used all the same",
            )

        if self.grids and (layout.height, layout.width) not in self.grids:
            self._warn_once(
                "grid",
                f"the schedule was not measured on frames of {layout.height}x{layout.width} "
                "patches; its factors are used all the same",
            )

    def _warn_once(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(message, Spark3rWarning, stacklevel=2)

    def _current(self, tokens: Tensor) -> Pass:
        """Return the pass that hidden states ``[B, N, C]`` belong to."""
        batch, length = tokens.shape[0], tokens.shape[1]
        if torch.compiler.is_compiling() and self._traced is not None:
            current: Pass | None = self._traced
        else:
            current = self._passes.get((batch, length))
        if current is None or current.layout.tokens != length:
            raise LayoutError(
                f"global attention was given {length} tokens (batch {batch}) of no announced pass. "
                f"Call the model so that its entry module runs: {self.family.usage}"
            )
        return current


@dataclass(frozen=True)
class _Undo:
    """One step of taking a schedule off; plain data, so that a patched model can be copied."""

    function: Callable[..., None]
    arguments: tuple[Any, ...] = ()

    def run(self) -> None:
        self.function(*self.arguments)


@dataclass(frozen=True)
class _Place:
    """A module's place in a handle, and the instance's own forward before it was patched."""

    handle: Handle
    index: int
    previous: Callable[..., Tensor] | None


_ABSENT = "<absent>"


def _restore(module: nn.Module, name: str, before: object) -> None:
    if isinstance(before, str) and before == _ABSENT:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = before


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Stand in for a global attention module's forward."""
    place: _Place = self.__dict__[PLACE]
    handle = place.handle
    if handle._enabled:
        tokens = args[0] if args else next(iter(kwargs.values()))
        current = handle._current(tokens)
        rule = current.rules[place.index]
        if not rule.is_dense:
            return handle.family.attend(self, current.layout, rule, *args, **kwargs)
    if place.previous is not None:
        return place.previous(*args, **kwargs)
    return type(self).forward(self, *args, **kwargs)
