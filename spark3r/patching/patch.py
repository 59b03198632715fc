"""Patches on a live model: how global attention is replaced, and how it is restored.

Only instances are changed: each global attention module gets a bound ``forward`` and a note of its
place among them, and the family's entry module gets a pre-hook that derives the token layout of a
pass. No module is wrapped, no class is changed, and ``state_dict`` keys stay as they are.

`Patch` is the mechanism; a subclass says what a layer runs. `AttentionReplacement` runs one
function in every layer, and a `Handle` follows a schedule.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..kernels.limits import refuse_wrong_norm
from ..layout import TokenLayout
from ..runner import Runner
from .passes import Pass, Passes

if TYPE_CHECKING:
    from typing_extensions import Self

LayerForward = Callable[..., Tensor]
"""``forward(module, layout, *args, **kwargs)`` with a global attention module and the arguments of
its forward; returns what the forward would."""

HANDLE = "_spark3r_handle"  # on the root module
PLACE = "_spark3r_place"  # on each global attention module


class Patch(ABC):
    """A change of a model's global attention, from `install` until `remove`.

    As a context manager it removes itself at the end.

    Attributes:
        family: Family of the model.
        root: The model inside its wrappers.
        layers: Qualified names of the global attention modules.
        saves_memory: True if the family's lossless memory savers are part of the patch.
    """

    def __init__(self, runner: Runner, saves_memory: bool = True) -> None:
        self.family = runner.family
        self.saves_memory = saves_memory
        self.root = runner.root
        self._modules = runner.attention
        self._entry = self.family.entry(self.root)
        self.layers = tuple(self._modules)
        self._undo: list[Callable[[], None]] = []
        self._reset()

    def _reset(self) -> None:
        """Forget everything about passes and pauses: a copy has none of its own."""
        self._passes = Passes(self.family.usage)
        self._pauses = 0
        self._enabled = True
        self._lock = threading.Lock()

    _TRANSIENT: ClassVar[tuple[str, ...]] = ("_passes", "_pauses", "_enabled", "_lock")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in self._TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def is_active(self) -> bool:
        """True as long as the model carries this patch."""
        return bool(self._undo)

    def remove(self) -> None:
        """Restore the model bit for bit. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the model dense inside the block, in every thread; blocks may overlap."""
        self._pause(1)
        try:
            yield
        finally:
            self._pause(-1)

    def _pause(self, change: int) -> None:
        with self._lock:
            self._pauses += change
            self._enabled = self._pauses == 0

    def __enter__(self) -> Self:
        if not self.is_active:
            raise PatchError("this patch was removed from its model: apply it again")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def install(self) -> Self:
        """Put the patch on the model, in the place of an earlier one, and return it.

        If anything fails the model is left as it was.

        Raises:
            PatchError: If a forward pass of an earlier patch is under way in this thread, or a
                module cannot be patched.
        """
        earlier: Patch | None = self.root.__dict__.get(HANDLE)
        if earlier is not None:
            earlier._refuse_if_running()
            earlier.remove()
        try:
            self._patch_modules()
        except BaseException:
            if earlier is not None:
                earlier._patch_modules()
            raise
        return self

    def _patch_modules(self) -> None:
        """Patch every module, or none."""
        try:
            self._set(self.root, HANDLE, self)
            hook = self._entry.register_forward_pre_hook(self._open, with_kwargs=True)
            self._undo.append(hook.remove)
            hook = self._entry.register_forward_hook(self._close, always_call=True)
            self._undo.append(hook.remove)
            for index, (name, module) in enumerate(self._modules.items()):
                if "forward" in module.__dict__ and self._replaces(index):
                    raise PatchError(
                        f"{name} has a forward of its own (an offloading hook, say), which a "
                        "reduced layer would not run: apply before it is installed, or leave this "
                        "layer dense"
                    )
                self._set(module, PLACE, _Place(self, index, module.__dict__.get("forward")))
                self._set(module, "forward", MethodType(_forward, module))
            for module, name, value in self.family.compile_fixes(self.root):
                self._set(module, name, value)
            for module, name, value in (
                self.family.memory_savers(self.root) if self.saves_memory else ()
            ):
                self._set(module, name, value)
        except BaseException:
            self.remove()
            raise

    def _set(self, module: nn.Module, name: str, value: object) -> None:
        before = module.__dict__.get(name, _ABSENT)
        self._undo.append(partial(_restore, module, name, before))
        module.__dict__[name] = value

    def _refuse_if_running(self) -> None:
        """Raise a PatchError if this thread is inside a pass of the model."""
        if self._passes.are_running():
            raise PatchError(
                f"a forward pass of {type(self.root).__name__} is under way: apply before or "
                "after it. If that pass was interrupted, call spark3r.remove(model) first"
            )

    def _open(self, entry: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Record the layout of the pass that begins (pre-hook of the entry module)."""
        if not self._enabled:
            return
        batch, layout = self.family.layout(entry, args, kwargs)
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        if torch.compiler.is_compiling():
            self._passes.trace(self._traced(layout, device))
            return
        self._passes.begin(batch, self._begun(layout, device))

    def _close(self, entry: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Record that this thread's innermost pass is over (forward hook of the entry module)."""
        if not torch.compiler.is_compiling():
            self._passes.end(output)

    # A subclass defines `_run`. One that follows a schedule overrides the other three as well.

    def _replaces(self, index: int) -> bool:
        """Return True if a layer may run another function than its own forward."""
        return True

    def _begun(self, layout: TokenLayout, device: str) -> Pass:
        """Return the pass that begins in eager mode."""
        return Pass(layout, ())

    def _traced(self, layout: TokenLayout, device: str) -> Pass:
        """Return the pass that begins in a compiled graph."""
        return Pass(layout, ())

    @abstractmethod
    def _run(
        self,
        module: nn.Module,
        index: int,
        current: Pass,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """Return a layer's output, or None if the layer is to run its own forward."""


class AttentionReplacement(Patch):
    """A patch that replaces every layer by one function. Made by `replace_attention`."""

    def __init__(self, runner: Runner, forward: LayerForward) -> None:
        super().__init__(runner)
        self._layer_forward = forward

    def _run(
        self,
        module: nn.Module,
        index: int,
        current: Pass,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        return self._layer_forward(module, current.layout, *args, **kwargs)


@dataclass(frozen=True)
class _Place:
    """A module's place in a patch, and the instance's own forward before it was patched."""

    patch: Patch
    index: int
    previous: Callable[..., Tensor] | None


_ABSENT = "<absent>"


def _restore(module: nn.Module, name: str, before: object) -> None:
    if isinstance(before, str) and before == _ABSENT:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = before


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Replace a global attention module's forward."""
    place: _Place = self.__dict__[PLACE]
    patch = place.patch
    if patch._enabled:
        tokens = args[0] if args else next(iter(kwargs.values()))
        current = patch._passes.current(tokens)
        refuse_wrong_norm(tokens, current.layout.frames)
        output = patch._run(self, place.index, current, args, kwargs)
        if output is not None:
            return output
    if place.previous is not None:
        return place.previous(*args, **kwargs)
    return type(self).forward(self, *args, **kwargs)
