"""The guard: the first pass of a patch is compared with what the model itself would have computed.

A family is recognised by names and argument lists, which a fork may keep while it changes what they
mean. So each global attention module is run twice on the upper rows of two frames of the first
pass: by its own forward, and by the family's with nothing reduced. Both must agree. And because a
selection of the wrong tokens would agree with itself, the order of tokens is checked by content:
pixels of a few patches change, and the tokens that move must be those that the layout names.

Differences stay on the device until the pass ends, and are read once. What a module keeps from one
call to the next cannot be seen here.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import LayoutError, PatchError
from ..families.base import Family
from ..layout import TokenLayout
from ..reduction.rule import ResolvedRule

TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 2e-2}
TOLERANCE = 1e-5
"""Largest relative difference of outputs, where `TOLERANCES` has none for their precision. Code
that computes the same steps differs by nothing; this is room for others of the same meaning."""

BRIGHTER = 0.2
"""Change of pixels, in units of the range of the images."""

ROWS, PATCHES = 2, 16
"""Least number of rows of patches, and of patches, of a frame on which modules are compared."""

_DENSE = ResolvedRule()


@dataclass
class _Findings:
    """What is known of one pass until it ends: scalars on the device.

    Attributes:
        layers: Relative difference of each module, by name.
        tolerances: Its largest allowed value.
        order: Largest movement of the other tokens in units of the median of the named ones; None
            if it is not known.
    """

    layers: dict[str, Tensor] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)
    order: Tensor | None = None


class _Stop(BaseException):
    """Ends a pass at its first global attention module."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


class Guard:
    """The comparison of the first pass. One object serves all threads until one pass has agreed.

    Attributes:
        always: Compare also where a pass reduces nothing.
        compared: Names of the modules that were compared, once a pass is over.
    """

    def __init__(self, always: bool = False) -> None:
        self.always = always
        self.compared: tuple[str, ...] = ()
        self._findings: dict[int, _Findings] = {}  # by thread
        self._stopping: set[int] = set()  # threads whose pass ends at the first global module

    def begin(
        self,
        family: Family,
        entry: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        layout: TokenLayout,
    ) -> None:
        """Begin the comparison of this thread's pass, and check the order of its tokens."""
        found = _Findings()
        images = _images(args, kwargs)
        if layout.frames > 1 and images is not None and not family.patches_overlap:
            found.order = self._order(family, entry, args, kwargs, images, layout)
        self._findings[threading.get_ident()] = found

    def see(
        self,
        family: Family,
        name: str,
        module: nn.Module,
        layout: TokenLayout,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Compare a global attention module with its replacement, on a part of two frames."""
        found = self._findings.get(threading.get_ident())
        if found is None or name in found.layers or _drops(module):
            return
        with torch.no_grad():
            index, part = _upper_rows(layout, _first_tensor(args, kwargs).device)
            args, kwargs = _cut((args, kwargs), layout.tokens, index)
            own = type(module).forward(module, *args, **kwargs)
            ours = family.reduced_forward(module, part, _DENSE, *args, **kwargs)
            found.layers[name] = _difference(ours, own)
        found.tolerances[name] = TOLERANCES.get(own.dtype, TOLERANCE)

    def stop(self, tokens: Tensor) -> None:
        """Leave a pass that was begun for the order of its tokens alone."""
        if threading.get_ident() in self._stopping:
            raise _Stop(tokens)

    def end(self, family: Family, *, has_run: bool) -> bool:
        """Read what was found in this thread's pass, and return True if it ran to its end.

        Args:
            family: Family of the model.
            has_run: Whether the pass ran to its end.

        Raises:
            PatchError: If a module differs from its replacement, or tokens lie in another order.
        """
        found = self._findings.pop(threading.get_ident(), None)
        if found is None or not has_run:
            return False
        order = [] if found.order is None else [found.order]
        scalars = [*found.layers.values(), *order]
        self.compared = tuple(found.layers)
        if not scalars:
            return True
        values = torch.stack(scalars).tolist()
        if order and values[-1] >= 1:  # layers would differ for the same reason
            raise PatchError(_of_the_order(family))
        for (name, tolerance), value in zip(found.tolerances.items(), values, strict=False):
            if not value <= tolerance:
                raise PatchError(_of_a_layer(family, name, value, tolerance))
        return True

    def _order(
        self,
        family: Family,
        entry: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        images: Tensor,
        layout: TokenLayout,
    ) -> Tensor | None:
        """Return the figure `_Findings.order`."""
        dim = images.ndim - 4
        frames = torch.tensor(_frames(layout), device=images.device)
        clip = images.index_select(dim, frames)
        call = _with_clip((args, dict(kwargs)), images, clip, dim, frames)
        try:
            _, two = family.layout(entry, *call)
        except LayoutError:
            return None
        if (two.frames, two.tokens_per_frame) != (2, layout.tokens_per_frame):
            return None
        patches = _spread(two)
        changed = _with_changed_patches(clip, two, patches)
        before = self._first_tokens(entry, clip, *call)
        call = _with_clip((args, dict(kwargs)), images, changed, dim, frames)
        after = self._first_tokens(entry, clip, *call)
        if before is None or after is None or before.shape[1] != two.tokens:
            return None
        moved = _moved(before, after).norm(dim=-1)[0]
        start = two.tokens_per_frame + two.patch_start
        named = torch.tensor([start + patch for patch in patches], device=moved.device)
        others = moved.index_fill(0, named, 0)
        return others.amax() / moved[named].median()

    def _first_tokens(
        self, entry: nn.Module, clip: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        """Return the tokens ``[B, N, C]`` that the first global attention module is given."""
        thread = threading.get_ident()
        self._stopping.add(thread)
        try:
            with _borrowed_random_numbers(entry, clip.device):
                entry.forward(*args, **kwargs)
        except _Stop as stopped:
            return stopped.tokens.detach()
        except LayoutError:  # of a layer inside a compiled part, which does not stop
            return None
        finally:
            self._stopping.discard(thread)
        return None


def has_values(tokens: Tensor) -> bool:
    """Return True if tensors of this kind have values that can be compared.

    Fake tensors and those on the meta device have none. A subclass that lets operations run as they
    do on plain tensors has, such as images that are normalised on demand.
    """
    runs_plainly = type(tokens).__torch_dispatch__ is Tensor.__torch_dispatch__
    return runs_plainly and tokens.device.type != "meta"


def _frames(layout: TokenLayout) -> list[int]:
    """Return two frames of a clip, or its only one. The anchor is the first."""
    first = layout.anchor_frame or 0
    return [first, (first + 1) % layout.frames][: layout.frames]


def _upper_rows(layout: TokenLayout, device: torch.device) -> tuple[Tensor, TokenLayout]:
    """Return the tokens ``[M]`` of a smaller clip inside of a clip, and their layout.

    They are the special tokens of two frames and their first rows of patches, and the tail.
    """
    chosen, size = _frames(layout), layout.tokens_per_frame
    height = min(layout.height, max(ROWS, -(-PATCHES // layout.width)))
    ranges = []
    for first in (frame * size for frame in chosen):
        start = first + layout.patch_start
        ranges.append((first, start + height * layout.width))
        ranges.append((start + layout.patches, first + size))
    ranges.append((layout.frames * size, layout.tokens))
    index = torch.cat([torch.arange(start, end, device=device) for start, end in ranges])
    anchor = None if layout.anchor_frame is None else 0
    return index, replace(
        layout, frames=len(chosen), height=height, anchor_frame=anchor, masked=None
    )


def _cut(tree: Any, tokens: int, index: Tensor) -> Any:
    """Cut what has a row for each token: hidden states ``[B, N, C]``, tables ``[N, D]``."""

    def cut(each: Tensor) -> Tensor:
        for dim in (0, 1) if each.ndim < 3 else (1, 0):
            if dim < each.ndim and each.shape[dim] == tokens:
                return each.index_select(dim, index)
        return each

    return tree_map_only(Tensor, cut, tree)


def _with_clip(tree: Any, images: Tensor, clip: Tensor, dim: int, frames: Tensor) -> Any:
    """Put a clip in the place of the images, and cut all else that has a row for each frame."""
    shape = images.shape[: dim + 1]

    def cut(each: Tensor) -> Tensor:
        if each is images:
            return clip
        return each.index_select(dim, frames) if each.shape[: dim + 1] == shape else each

    return tree_map_only(Tensor, cut, tree)


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return next(each for each in tree_leaves((args, dict(kwargs))) if isinstance(each, Tensor))


def _images(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the images ``[B, S, 3, H, W]`` or ``[S, 3, H, W]`` of a call, None without any."""
    for each in (*args, *kwargs.values()):
        if isinstance(each, Tensor) and each.ndim in (4, 5) and each.is_floating_point():
            return each
    return None


def _spread(layout: TokenLayout) -> list[int]:
    """Return three patches at unequal distances.

    Of those, another order of the tokens moves at most one to the place of another.
    """
    return sorted({int(share * layout.patches) for share in (0.06, 0.31, 0.83)})


def _with_changed_patches(clip: Tensor, layout: TokenLayout, patches: list[int]) -> Tensor:
    """Return images whose second frame is brighter in the middle of some patches.

    The change is small and smooth, so that it reaches little else before attention mixes tokens.
    """
    changed = clip.clone()
    high, wide = clip.shape[-2] // layout.height, clip.shape[-1] // layout.width
    rows, columns = (
        torch.sin(torch.linspace(0, math.pi, side + 2, device=clip.device)[1:-1]) ** 2
        for side in (high, wide)
    )
    bump = ((clip.amax() - clip.amin() + 0.1) * BRIGHTER * rows[:, None] * columns).to(clip.dtype)
    for patch in patches:
        row, column = divmod(patch, layout.width)
        top, left = row * high, column * wide
        changed[..., 1, :, top : top + high, left : left + wide] += bump
    return changed


def _difference(ours: Tensor, own: Tensor) -> Tensor:
    """Return the root mean square of a difference, relative to that of the model's own output."""
    size = torch.where(own.isfinite(), own.float(), 0.0).norm()
    return _moved(own, ours).norm() / size.clamp_min(torch.finfo(torch.float32).tiny)


def _moved(base: Tensor, other: Tensor) -> Tensor:
    """Return ``other - base`` in float32, 0 where the base is not finite."""
    return torch.where(base.isfinite(), other.float() - base.float(), 0.0)


def _drops(module: nn.Module) -> bool:
    """Return True if a module drops values at random, so that two calls differ."""
    return any(
        each.training and each.p > 0 for each in module.modules() if isinstance(each, nn.Dropout)
    )


@contextmanager
def _borrowed_random_numbers(entry: nn.Module, device: torch.device) -> Iterator[None]:
    """Return a context after which the random numbers that dropout took in training are back."""
    if not entry.training:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _of_a_layer(family: Family, name: str, difference: float, tolerance: float) -> str:
    return (
        f"{name} does not compute what the {family.name} family computes in its place: with "
        f"nothing reduced, their outputs differ by {difference:.2g} of their size, more than "
        f"{tolerance:g}. Usual causes: code that was changed (other positions, scaled logits, a "
        "gate, another order of norm and rotary embedding), or a model of another family. The "
        "schedule was removed. Write a family for this model, describe it with spark3r.generic, "
        "or pass guard=False if the difference is meant"
    )


def _of_the_order(family: Family) -> str:
    return (
        f"tokens do not lie where the {family.name} family expects them: pixels of a few patches "
        "were changed, and before the first global layer other tokens moved more than those of "
        "these patches. Usual causes: special tokens at the other end of a frame, a transposed "
        "patch grid, tokens ordered patch by patch. The schedule was removed. Correct the "
        "description of the layout, or pass guard=False if the order is right"
    )
