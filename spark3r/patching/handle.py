"""The patch that follows a schedule, as `spark3r.apply` returns it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compiling import assume_constant_result, eagerly
from ..errors import FamilyError, LayoutError, PatchError, Spark3rWarning
from ..families.base import MASKED, Replacement
from ..layout import TokenLayout
from ..reduction.operators import Operators
from ..reduction.rule import ResolvedRule
from ..runner import Runner, device_of, dtype_name, dtype_of, matmul_dtype
from ..schedule import Schedule
from .guard import Guard
from .passes import Pass
from .patch import Patch, runs_ours
from .shared import agree, share

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Handle(Patch):
    """A schedule on a model: prints its layers, pauses, and is removed again.

    Made by `apply`. As a context manager it removes itself at the end.

    Attributes:
        schedule: The schedule.
        grids: Patch grids (rows, columns) that the schedule was measured on; empty when unknown.
        dtypes: Precisions, such as ``bfloat16``, that it was measured in; empty when unknown.
        group: Process group of the ranks that share each clip; None if this process is alone.

    Raises:
        FamilyError: If ranks cannot share a clip of this model.
        PatchError: If the schedule and the model have different numbers of layers.
    """

    def __init__(
        self,
        runner: Runner,
        schedule: Schedule,
        grids: frozenset[tuple[int, int]] = frozenset(),
        dtypes: frozenset[str] = frozenset(),
        saves_memory: bool = True,
        guarded: bool = True,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(runner, saves_memory, guarded)
        self.group = group
        if len(schedule.layers) != len(self.layers):
            raise PatchError(
                f"the schedule has {len(schedule.layers)} layer rules, but "
                f"{type(self.root).__name__} has {len(self.layers)} global attention layers"
            )
        self.schedule = schedule
        self.grids = grids
        self.dtypes = dtypes

    def _reset(self) -> None:
        super()._reset()
        self._resolved: dict[TokenLayout, tuple[ResolvedRule, ...]] = {}
        self._warned: set[str] = set()
        self._mask: Tensor | None = None
        self._masked_layouts: dict[TokenLayout, TokenLayout] = {}
        self._number = next(_NUMBERS)
        _HANDLES[self._number] = self

    _TRANSIENT = (*Patch._TRANSIENT, "_resolved", "_warned", "_number", "_mask", "_masked_layouts")

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

    def share(self, frames: int) -> slice:
        """Return the frames of a clip that this rank is to call the model with.

        Every rank holds a run of whole query groups. A process that is alone holds all frames.

        Args:
            frames: Number of frames of the whole clip.

        Raises:
            LayoutError: If there are fewer query groups than ranks.
        """
        if self.group is None:
            return slice(0, frames)
        return share(self.schedule, frames, self.group)

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise PatchError(
                "a schedule that several processes share cannot be copied or pickled: remove it "
                "first, and apply it to the copy"
            )
        return super().__getstate__()

    def verify(self, images: Tensor) -> None:
        """Compare the model's own attention with what replaces it, in an eager pass over a clip.

        The first eager pass does the same by itself, see `apply`. This is for compiled models and
        for schedules that were applied with ``guard=False``.

        Args:
            images: A clip ``[S, 3, H, W]`` in [0, 1], as the model takes it.

        Raises:
            PatchError: If they differ, or tokens lie in another order than the family says; the
                schedule is removed then. Or if nothing could be compared: the schedule is removed
                or paused, or the model goes past its global attention modules.
        """
        guard = self._guard = Guard(always=True)
        with eagerly():
            Runner(self.root, self.family).run(images)
        if not guard.compared:
            self._guard = None
            raise PatchError(
                f"nothing was compared in a pass of {type(self.root).__name__}: the schedule is "
                "removed or paused, or the model ran past its global attention modules"
            )

    def _sharding(self) -> Iterable[Replacement]:
        if self.group is None:
            return ()
        if self.family.sharding is None:
            raise FamilyError(
                f"several processes cannot share a clip of family '{self.family.name}': it does "
                "not say which other parts of the model couple frames (Family.sharding)"
            )
        return self.family.sharding(self.root, self._exchange)

    @contextmanager
    def masking(self, mask: Tensor) -> Iterator[None]:
        """Let no query attend to masked patches in any global layer, inside the block.

        Layers at factors of 1 mask as well. Masked patches still ask: they get depth and points.
        All clips of a batch have the same mask. ``disabled()`` is without it.

        Args:
            mask: ``[S, H, W]`` bool, of the size of the model's images: False where a pixel is
                masked. A patch is masked if at least half of its pixels are. It is read on the
                host once, before the pass.

        Raises:
            LayoutError: If the mask has another form or masks everything. A pass raises it if the
                mask does not fit its frames, or if the model reorders them.
            PatchError: If the schedule is removed, several processes share each clip, or others
                have replaced the forward of a global attention module.
        """
        if not self.is_active:
            raise PatchError("this schedule was removed from its model: apply it again")
        if mask.dtype != torch.bool or mask.ndim != 3:
            raise LayoutError(
                f"the mask is {mask.dtype} of shape {list(mask.shape)}, expected bool [S, H, W]"
            )
        if not mask.any():
            raise LayoutError("the mask leaves no pixel: False is masked, True is used")
        if self.group is not None:
            raise PatchError(
                "a clip that several processes share cannot be masked: use one process"
            )
        for name, module in self._modules.items():
            if not runs_ours(module):
                raise PatchError(
                    f"{name} has a forward of its own (an offloading hook, say), which a mask "
                    "would not reach: apply before it is installed"
                )
        try:
            self._mask, self.root.__dict__[MASKED] = mask.cpu(), True
            yield
        finally:
            self._mask = None
            self._masked_layouts.clear()
            self._resolved.clear()
            self.root.__dict__.pop(MASKED, None)

    def _masked(
        self,
        layout: TokenLayout,
        entry: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> TokenLayout:
        mask = self._mask
        if mask is None:
            return layout
        if torch.compiler.is_compiling():
            raise LayoutError("a compiled pass cannot be masked: run the model eagerly")
        reason = self.family.reorders(entry, args, kwargs)
        if reason is not None:
            raise LayoutError(f"the mask cannot be placed: {reason}")
        if layout not in self._masked_layouts:
            self._masked_layouts[layout] = masked_layout(layout, mask)
        return self._masked_layouts[layout]

    def _replaces(self, index: int) -> bool:
        if self.group is not None:
            return True
        return not self.schedule.layers[index].is_dense or self.schedule.length.mode == "paper"

    def _begun(self, batch: int, layout: TokenLayout, device: str) -> Pass:
        if self.group is not None:
            if torch.is_grad_enabled():
                raise LayoutError(
                    "several processes share a clip without gradients only: run the model under "
                    "torch.no_grad() or torch.inference_mode()"
                )
            where = device_of(self.root)
            shared = agree(batch, layout, self.schedule, self.group, where)
            whole = self._begun_whole(shared.shard.whole, device)
            own = TokenLayout(*shared.fields)
            return Pass(own, whole.rules, shared)
        return self._begun_whole(layout, device)

    def _begun_whole(self, layout: TokenLayout, device: str) -> Pass:
        rules = self._resolved.get(layout)
        if rules is None:
            rules = self._resolved[layout] = self.schedule.resolve_within(layout)
            self._warn(layout, rules, device)
        return Pass(layout, rules)

    def _traced(self, layout: TokenLayout, device: str) -> Pass:
        if self.group is not None:
            raise LayoutError(
                "several processes cannot share a pass of a compiled model: run it without "
                "torch.compile"
            )
        _warn_when_traced(self._number, device, *layout.fields)
        return Pass(layout, self.schedule.resolve_within(layout))

    def _reduces(self, current: Pass) -> bool:
        reduced = current.shared is not None or current.layout.masked is not None
        return reduced or not all(rule.is_dense for rule in current.rules)

    def _run(
        self,
        module: nn.Module,
        index: int,
        current: Pass,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        rule = current.rules[index]
        if current.shared is not None:
            return self.family.reduced_forward(module, current.shared, rule, *args, **kwargs)
        if rule.is_dense and current.layout.masked is None:
            return None
        return self.family.reduced_forward(module, current.layout, rule, *args, **kwargs)

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


def masked_layout(layout: TokenLayout, mask: Tensor) -> TokenLayout:
    """Return the layout with the patches masked of which a mask leaves at most half.

    Args:
        layout: Token layout of the pass.
        mask: ``[S, H, W]`` bool on the CPU, False where a pixel is masked.

    Raises:
        LayoutError: If the mask has other frames, its sides are no multiples of the patch grid, or
            no patch is left.
    """
    frames, height, width = mask.shape
    grid = (layout.height, layout.width)
    if frames != layout.frames or height % grid[0] or width % grid[1]:
        raise LayoutError(
            f"the mask has {frames} frames of {height}x{width} pixels, which does not fit a pass "
            f"of {layout.frames} frames of {grid[0]}x{grid[1]} patches"
        )
    left = F.adaptive_avg_pool2d(mask.float()[:, None], grid)
    masked = (left <= 0.5).flatten().to(torch.uint8)
    if bool(masked.all()):
        raise LayoutError("the mask leaves no patch: of each one at least half is masked")
    return replace(layout, masked=masked.numpy().tobytes())


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
