"""Patches on a live model: how global attention is replaced, and how it is restored.

Only instances are changed: each global attention module gets a bound ``forward`` and a note of its
place among them, and the family's entry module gets a pre-hook that derives the token layout of a
pass. No module is wrapped, no class is changed, and ``state_dict`` keys stay as they are.

`Patch` is the mechanism, and replaces every layer by one function. `Handle` is a patch that follows
a schedule.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..compiling import assume_constant_result
from ..errors import PatchError, Spark3rWarning
from ..layout import TokenLayout
from ..reduction.operators import Operators
from ..reduction.rule import ResolvedRule
from ..runner import Runner, dtype_name, dtype_of, matmul_dtype
from ..schedule import Schedule
from .passes import Pass, Passes

if TYPE_CHECKING:
    from typing_extensions import Self

Attend = Callable[..., Tensor]
"""``attend(module, layout, *args, **kwargs)`` with a global attention module and the arguments of
its forward; returns what the forward would."""

HANDLE = "_spark3r_handle"  # on the root module
PLACE = "_spark3r_place"  # on each global attention module


class Patch:
    """A replacement of a model's global attention, until it is removed.

    Made by `replace_attention`. As a context manager it removes itself at the end.

    Attributes:
        family: Family of the model.
        root: The model inside its wrappers.
        layers: Qualified names of the global attention modules.
        saves_memory: True if the family's lossless memory savers are part of the patch.
    """

    def __init__(self, runner: Runner, attend: Attend, saves_memory: bool = True) -> None:
        self.family = runner.family
        self.saves_memory = saves_memory
        self.root = runner.root
        self._attend = attend
        self._modules = runner.attention
        self._entry = self.family.entry(self.root)
        self.layers = tuple(self._modules)
        self._undo: list[_Undo] = []
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
            self._undo.pop().run()

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

    def install(self) -> None:
        """Patch every module, or none."""
        try:
            self._set(self.root, HANDLE, self)
            hook = self._entry.register_forward_pre_hook(self._open, with_kwargs=True)
            self._undo.append(_Undo(hook.remove))
            hook = self._entry.register_forward_hook(self._close, always_call=True)
            self._undo.append(_Undo(hook.remove))
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
        self._undo.append(_Undo(_restore, (module, name, before)))
        module.__dict__[name] = value

    def refuse_if_running(self) -> None:
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

    # A patch that follows a schedule overrides the four methods below.

    def _replaces(self, index: int) -> bool:
        """Return True if a layer may run another function than its own forward."""
        return True

    def _begun(self, layout: TokenLayout, device: str) -> Pass:
        """Return the pass that begins in eager mode."""
        return Pass(layout, ())

    def _traced(self, layout: TokenLayout, device: str) -> Pass:
        """Return the pass that begins in a compiled graph."""
        return Pass(layout, ())

    def _run(
        self,
        module: nn.Module,
        index: int,
        current: Pass,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """Return a layer's output, or None if the layer is to run its own forward."""
        return self._attend(module, current.layout, *args, **kwargs)


class Handle(Patch):
    """A schedule on a model: prints its layers, pauses, and is removed again.

    Made by `apply`. As a context manager it removes itself at the end.

    Attributes:
        schedule: The schedule.
        grids: Patch grids (rows, columns) that the schedule was measured on; empty when unknown.
        dtypes: Precisions, such as ``bfloat16``, that it was measured in; empty when unknown.
    """

    def __init__(
        self,
        runner: Runner,
        schedule: Schedule,
        grids: frozenset[tuple[int, int]] = frozenset(),
        dtypes: frozenset[str] = frozenset(),
        saves_memory: bool = True,
    ) -> None:
        super().__init__(runner, runner.family.attend, saves_memory)
        self.schedule = schedule
        self.grids = grids
        self.dtypes = dtypes

    def _reset(self) -> None:
        super()._reset()
        self._resolved: dict[TokenLayout, tuple[ResolvedRule, ...]] = {}
        self._warned: set[str] = set()
        self._number = next(_NUMBERS)
        _HANDLES[self._number] = self

    _TRANSIENT = (*Patch._TRANSIENT, "_resolved", "_warned", "_number")

    def __str__(self) -> str:
        state = "" if self.is_active else " (removed)"
        width = max(len(name) for name in self.layers)
        lines = [
            f"spark3r on {type(self.root).__name__}{state}: family {self.family.name}, "
            f"{len(self.layers)} global layers, length rule {self.schedule.length.mode}",
            f"operators: {_words(self.schedule.operators)}",
            f"{'layer':<{width}}  query  key-value",
        ]
        for name, rule in zip(self.layers, self.schedule.layers, strict=True):
            own = "" if rule.operators is None else f"  {_words(rule.operators)}"
            lines.append(f"{name:<{width}}  {rule.query:>5}  {rule.key_value:>9}{own}")
        return "\n".join(lines)

    def _replaces(self, index: int) -> bool:
        return not self.schedule.layers[index].is_dense or self.schedule.length.mode == "paper"

    def _begun(self, layout: TokenLayout, device: str) -> Pass:
        rules = self._resolved.get(layout)
        if rules is None:
            rules = self._resolved[layout] = self.schedule.resolve_within(layout)
            self._warn(layout, rules, device)
        return Pass(layout, rules)

    def _traced(self, layout: TokenLayout, device: str) -> Pass:
        _warn_when_traced(self._number, device, *layout.fields)
        return Pass(layout, self.schedule.resolve_within(layout))

    def _run(
        self,
        module: nn.Module,
        index: int,
        current: Pass,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        rule = current.rules[index]
        if rule.is_dense:
            return None
        return self._attend(module, current.layout, rule, *args, **kwargs)

    def _warn(self, layout: TokenLayout, rules: tuple[ResolvedRule, ...], device: str) -> None:
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
                "was measured up to; its factors are used anyway",
            )
        if self.grids and (layout.height, layout.width) not in self.grids:
            self._warn_once(
                "grid",
                f"the schedule was not measured on frames of {layout.height}x{layout.width} "
                "patches; its factors are used anyway",
            )
        if self.dtypes:
            own = dtype_of(next(iter(self._modules.values())))
            running = dtype_name(matmul_dtype(own, device))
            if running not in self.dtypes:
                self._warn_once(
                    "dtype",
                    f"the schedule was measured in {' or '.join(sorted(self.dtypes))}, this pass "
                    f"runs in {running}; its factors are used anyway",
                )

    def _warn_once(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(message, Spark3rWarning, stacklevel=2)


@dataclass(frozen=True)
class _Undo:
    """One step of removing a patch; plain data, so that a patched model can be copied."""

    function: Callable[..., None]
    arguments: tuple[Any, ...] = ()

    def run(self) -> None:
        self.function(*self.arguments)


@dataclass(frozen=True)
class _Place:
    """A module's place in a patch, and the instance's own forward before it was patched."""

    patch: Patch
    index: int
    previous: Callable[..., Tensor] | None


_ABSENT = "<absent>"


def _words(operators: Operators) -> str:
    return f"{operators.key_value.describe()}; queries {operators.query.describe()}"


_NUMBERS = itertools.count()
_HANDLES: WeakValueDictionary[int, Handle] = WeakValueDictionary()


@assume_constant_result
def _warn_when_traced(number: int, device: str, *fields: Any) -> bool:
    """Warn in a traced pass as in an eager one. The result is a constant to the compiler.

    The handle is named by its number, because Dynamo takes only constants here up to torch 2.8.
    """
    handle = _HANDLES[number]
    layout = TokenLayout(*fields)
    handle._warn(layout, handle.schedule.resolve_within(layout), device)
    return True


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
        output = patch._run(self, place.index, patch._passes.current(tokens), args, kwargs)
        if output is not None:
            return output
    if place.previous is not None:
        return place.previous(*args, **kwargs)
    return type(self).forward(self, *args, **kwargs)
