"""Patches on a live model: how global attention is replaced, and how it is restored.

Only instances are changed: each global attention module gets a ``forward`` and a note of its place
among them, and the family's entry module gets a pre-hook that derives the token layout of a pass.
No module is wrapped, no class is changed, and ``state_dict`` keys stay as they are.

Others may wrap what a patch has set, as offloading hooks wrap ``forward``. Only what is still ours
is removed, and a forward inside such a hook then runs the class's. What is set are partial
functions, because pickle and deepcopy know them.

`Patch` is the mechanism; a subclass says what a layer runs. `AttentionReplacement` runs one
function in every layer, and a `Handle` follows a schedule.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import LayoutError, PatchError
from ..families.base import SAVES_MEMORY, Replacement, overridden
from ..families.registry import FAMILIES, named_family
from ..kernels import norm_rope
from ..kernels.limits import refuse_wrong_norm
from ..layout import TokenLayout
from ..reduction.exchange import Exchange
from ..reduction.rule import ResolvedRule
from ..runner import Runner
from .guard import Guard, has_values
from .passes import Pass, Passes

if TYPE_CHECKING:
    from typing_extensions import Self

LayerForward = Callable[..., Tensor]
"""``forward(module, layout, *args, **kwargs)`` with a global attention module and the arguments of
its forward; returns what the forward would."""

HANDLE = "_spark3r_handle"  # on the root module
PLACE = "_spark3r_place"  # on each global attention module
FRAME = "_spark3r_frame"  # on each module that attends inside frames


class Patch(ABC):
    """A change of a model's global attention, from `install` until `remove`.

    As a context manager it removes itself at the end.

    Attributes:
        family: Family of the model.
        root: The model inside its wrappers.
        layers: Qualified names of the global attention modules.
        saves_memory: True if the family's lossless memory savers are part of the patch.
        guarded: True if the first pass is compared with the model's own attention; see `Guard`.
    """

    def __init__(self, runner: Runner, saves_memory: bool = True, guarded: bool = False) -> None:
        self.family = runner.family
        self.saves_memory = saves_memory
        self.guarded = guarded
        self.root = runner.root
        self._modules = runner.attention
        self._entry = self.family.entry(self.root)
        self.layers = tuple(self._modules)
        self._undo: list[Callable[[], None]] = []
        self._reset()

    def _reset(self) -> None:
        """Forget everything about passes and pauses: a copy has none of its own."""
        self._passes = Passes(self.family.usage, self._entry)
        self._guard = Guard() if self.guarded else None
        self._found_wrong: PatchError | None = None
        self._exchange = Exchange()
        self._pauses: set[object] = set()
        self._enabled = True
        self._lock = threading.Lock()

    _TRANSIENT: ClassVar[tuple[str, ...]] = (
        *("_passes", "_guard", "_found_wrong", "_exchange", "_pauses", "_enabled", "_lock"),
    )

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in self.__dict__.items() if key not in self._TRANSIENT}
        if FAMILIES.get(self.family.name) is self.family:
            state["family"] = self.family.name
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.family, str):
            self.family = named_family(self.family)
        self._reset()

    @property
    def is_active(self) -> bool:
        """True as long as the model carries this patch."""
        return bool(self._undo)

    def remove(self) -> None:
        """Restore the model bit for bit. A second call does nothing."""
        try:
            self._take_off()
        except BaseException:
            self._take_off()  # an interrupt takes nothing off twice, and leaves nothing on
            raise

    def _take_off(self) -> None:
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the model dense inside the block, in every thread; blocks may overlap."""
        pause = object()
        try:
            try:
                with self._lock:
                    self._pauses.add(pause)
                    self._enabled = False
                yield
            finally:
                self._resume(pause)
        except BaseException:
            self._resume(pause)  # once more, because an interrupt may have hit the first
            raise

    def _resume(self, pause: object) -> None:
        with self._lock:
            self._pauses.discard(pause)
            self._enabled = not self._pauses

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
        replacements = self._replacements()
        earlier = self._earlier()
        if earlier is not None:
            earlier._refuse_if_running()
        try:
            if earlier is not None:
                earlier.remove()
            self._put_on(replacements)
            return self
        except BaseException:
            self.remove()
            if earlier is not None and not earlier.is_active:
                earlier._put_on(earlier._replacements())
            raise

    def _earlier(self) -> Patch | None:
        """Return the patch that the model carries, perhaps under another family."""
        places = (module.__dict__.get(PLACE) for module in self._modules.values())
        found = (place.patch for place in places if place is not None)
        return next(found, self.root.__dict__.get(HANDLE))

    def _replacements(self) -> list[Replacement]:
        """Return what the patch sets, or refuse. Nothing is changed yet."""
        found: list[Replacement] = [(self.root, HANDLE, self)]
        for index, (name, module) in enumerate(self._modules.items()):
            found.append((module, PLACE, _Place(self, index)))
            if not overridden(module):
                found.append((module, "forward", partial(_forward, module)))
            elif self._replaces(index) and not _is_inside(module.__dict__["forward"]):
                raise PatchError(
                    f"{name} has a forward of its own (an offloading hook, say), which a reduced "
                    "layer would not run: apply before it is installed, or leave this layer dense"
                )
        for module in self.family.frame_attention(self.root):
            if not overridden(module):
                found += [
                    (module, FRAME, self),
                    (module, "forward", partial(_frame_forward, module)),
                ]
        found += self.family.compile_fixes(self.root)
        if self.saves_memory:
            found += [(self.root, SAVES_MEMORY, True), *self.family.memory_savers(self.root)]
        return [*found, *self._sharding()]

    def _put_on(self, replacements: list[Replacement]) -> None:
        for module, name, value in replacements:
            self._set(module, name, value)
        entry, undo = self._entry, self._undo
        undo.append(entry.register_forward_pre_hook(self._open, with_kwargs=True).remove)
        undo.append(entry.register_forward_hook(self._close, always_call=True).remove)
        undo.append(self._exchange.end)

    def _set(self, module: nn.Module, name: str, value: object) -> None:
        before = [module.__dict__[name]] if name in module.__dict__ else []
        self._undo.append(partial(_restore, module, name, value, *before))
        module.__dict__[name] = value

    def _refuse_if_running(self) -> None:
        """Raise a PatchError if this thread is inside a pass of the model."""
        if self._passes.are_running():
            raise PatchError(
                f"a forward pass of {type(self.root).__name__} is under way: apply before or after"
            )

    def _open(self, entry: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Record the layout of the pass that begins (pre-hook of the entry module)."""
        self._exchange.layout = None
        if not self._enabled:
            return
        if getattr(entry, "_is_replica", False):
            raise PatchError(
                f"DataParallel has copied {type(self.root).__name__} to another device, and copies "
                "do not follow a schedule: use one process per device (DistributedDataParallel)"
            )
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise LayoutError(
                "torch.jit.trace, and torch.onnx.export with dynamo=False, cannot follow a "
                "schedule: use torch.export.export or torch.onnx.export(dynamo=True), which can, "
                "or trace the dense model inside handle.disabled()"
            )
        batch, layout = self.family.layout(entry, args, kwargs)
        layout = self._masked(layout, entry, args, kwargs)
        tensors = _tensors((*args, *kwargs.values()))
        device = tensors[0].device.type if tensors else "cpu"
        if torch.compiler.is_compiling():
            self._passes.trace(self._traced(layout, device))
            return
        if self._found_wrong is not None:
            raise self._found_wrong
        begun = self._begun(batch, layout, device)
        guard = self._guard
        compares = guard is not None and (guard.always or self._reduces(begun))
        if guard is not None and compares and tensors and has_values(tensors[0]):
            guard.begin(self.family, entry, args, kwargs, layout)
        self._passes.begin(batch, begun)
        if begun.shared is not None:
            self._exchange.begin(begun.shared)

    def _close(self, entry: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Record that this thread's innermost pass is over (forward hook of the entry module)."""
        if torch.compiler.is_compiling():
            return
        self._passes.end(output)
        self._exchange.end()
        guard = self._guard
        try:
            if guard is not None and guard.end(self.family, has_run=output is not None):
                self._guard = None
        except PatchError as error:
            self._found_wrong = error
            raise
        finally:
            if self._found_wrong is not None and not self._passes.are_running_anywhere():
                self.remove()

    # A subclass defines `_run`. One that follows a schedule overrides the others as well.

    def _sharding(self) -> Iterable[Replacement]:
        """Return the replacements by which several ranks share a clip."""
        return ()

    def _replaces(self, index: int) -> bool:
        """Return True if a layer may run another function than its own forward."""
        return True

    def _masked(
        self,
        layout: TokenLayout,
        entry: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> TokenLayout:
        """Return the layout of a pass with its masked patches."""
        return layout

    def _begun(self, batch: int, layout: TokenLayout, device: str) -> Pass:
        """Return the pass that begins in eager mode."""
        return Pass(layout, ())

    def _traced(self, layout: TokenLayout, device: str) -> Pass:
        """Return the pass that begins in a compiled graph."""
        return Pass(layout, ())

    def _reduces(self, current: Pass) -> bool:
        """Return True if a pass differs from that of the unpatched model."""
        return True

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
    """A module's place in a patch."""

    patch: Patch
    index: int


def _restore(module: nn.Module, name: str, value: object, *before: object) -> None:
    """Undo what was set on a module, if it is still there."""
    if module.__dict__.get(name) is not value:
        return
    if before:
        module.__dict__[name] = before[0]
    else:
        del module.__dict__[name]


def runs_ours(module: nn.Module) -> bool:
    """Return True if a global attention module's forward is ours, or a hook's that wraps ours."""
    return _is_inside(module.__dict__.get("forward"))


def _is_inside(forward: object) -> bool:
    """Return True if a hook's forward wraps ours, as ``functools.wraps`` notes it."""
    while forward is not None:
        if isinstance(forward, partial) and forward.func is _forward:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Replace a global attention module's forward."""
    place: _Place | None = self.__dict__.get(PLACE)
    if place is not None and place.patch._enabled:
        tokens = args[0] if args else next(iter(kwargs.values()))
        patch = place.patch
        # A compiled graph would be compiled again when the guard goes.
        guard = None if torch.compiler.is_compiling() else patch._guard
        if guard is not None:
            guard.stop(tokens)
        current = patch._passes.current(tokens)
        refuse_wrong_norm(tokens, current.layout.frames)
        if guard is not None:
            name = patch.layers[place.index]
            guard.see(patch.family, name, self, current.layout, args, kwargs)
        output = patch._run(self, place.index, current, args, kwargs)
        if output is not None:
            return output
    return type(self).forward(self, *args, **kwargs)


_DENSE = ResolvedRule()


def _frame_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Replace the forward of a module that attends inside frames; see `Family.frame_forward`.

    Passes that reduce nothing run the module's own forward, so that they give the same bits.
    """
    patch: Patch | None = self.__dict__.get(FRAME)
    tokens: Tensor = args[0] if args else next(iter(kwargs.values()))
    if patch is None or not patch._enabled or not norm_rope.is_possible(tokens.device):
        return type(self).forward(self, *args, **kwargs)
    forward, current = patch.family.frame_forward, patch._passes.innermost()
    if forward is not None and current is not None and patch._reduces(current):
        frame = replace(current.layout, frames=1, tail=0, anchor_frame=None, masked=None)
        if tokens.shape[1] == frame.tokens and not torch.is_grad_enabled():
            return forward(self, frame, _DENSE, *args, **kwargs)
    return type(self).forward(self, *args, **kwargs)


def _tensors(given: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors among arguments; if there are none, those that a dataclass among them has.

    MapAnything's transformer is given all its inputs in one.
    """
    found = [each for each in given if isinstance(each, Tensor)]
    held = [value for each in given if is_dataclass(each) for value in vars(each).values()]
    return found or [each for each in tree_leaves(held) if isinstance(each, Tensor)]
