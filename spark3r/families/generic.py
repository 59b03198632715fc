"""Any model: attention modules by pattern, token layout by numbers or a small function.

No family knows how such a module projects its tokens, so keys and values are pruned after the
projection: the module runs as it is, and its one call of ``scaled_dot_product_attention`` is
reduced. ``nn.MultiheadAttention`` is refused, because its call cannot be intercepted. A family
written for the architecture also saves the projections of pruned tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import FamilyError, LayoutError
from ..layout import TokenLayout
from ..reduction.attention import attend
from ..reduction.plans import select
from ..reduction.rule import ResolvedRule
from ..sdpa import ReplaceSDPA
from .base import Family, LayoutFunction

Names = str | Sequence[str] | Callable[[str], bool]
"""A pattern of qualified names in shell style, several, or a function that is true for a name."""


def generic(
    attention: Names,
    *,
    entry: str = "",
    patch_size: int | None = None,
    special: int = 0,
    special_last: bool = False,
    tail: int = 0,
    anchor_frame: int | None = None,
    layout: Callable[..., tuple[int, TokenLayout]] | None = None,
    patches_overlap: bool = False,
) -> Family:
    """Return the family of a model that no other family knows.

    It is passed to ``spark3r.apply(model, schedule, family=...)``.

    Args:
        attention: Pattern of qualified module names in shell style, such as
            ``"blocks.*.global.attn"``, a list of patterns, or a function that returns True for a
            name. It must match the global attention modules and no others. They are taken in the
            order in which the model holds them, which must be that of a pass.
        entry: Qualified name of the module that takes the images, "" for the model itself. Where
            the call goes past it (a method of the model, say), it may be a submodule that every
            call runs first, such as the patch embedding.
        patch_size: Side of a patch in pixels. The entry module's first argument must then be
            images ``[B, S, 3, H, W]``, or ``[S, 3, H, W]`` for a batch of one.
        special: Number of special tokens per frame.
        special_last: Whether the special tokens stand after the frame's patches.
        tail: Number of tokens after all frames.
        anchor_frame: Number of the frame that has special tokens of its own, or None.
        layout: Function of the entry module's arguments that returns the batch size and the
            `TokenLayout`. It replaces all of the numbers.
        patches_overlap: True if tokens see pixels of neighbouring patches, see `Family`.

    Raises:
        FamilyError: If neither or both of ``patch_size`` and ``layout`` are given. `spark3r.apply`
            raises it if the pattern or the entry name matches nothing.
    """
    numbers = (special, special_last, tail, anchor_frame)
    find_layout: LayoutFunction
    if layout is None and patch_size is not None:
        if not isinstance(patch_size, int) or patch_size < 1:
            raise FamilyError(f"patch_size is {patch_size!r}, expected pixels, at least 1")
        find_layout = partial(_layout_by_numbers, patch_size, numbers)
    elif layout is not None and patch_size is None and numbers == _NO_NUMBERS:
        find_layout = partial(_layout_by_function, layout)
    else:
        raise FamilyError("generic() needs either patch_size= with token counts, or layout=")
    metadata = {"special_tokens": special}
    if patch_size is not None:
        metadata["patch_size"] = patch_size
    return Family(  # of functions that pickle can name
        name="generic",
        usage=f"a call that goes through {entry or 'the model'} with its images first",
        matches=_any,
        attention=partial(_find, attention),
        entry=partial(_get, entry),
        layout=find_layout,
        reduced_forward=_reduced_forward,
        patches_overlap=patches_overlap,
        metadata=partial(_metadata, metadata),
    )


_Numbers = tuple[int, bool, int, int | None]  # special, special_last, tail, anchor_frame
_NO_NUMBERS: _Numbers = (0, False, 0, None)


def _layout_by_numbers(
    patch_size: int,
    numbers: _Numbers,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[int, TokenLayout]:
    images = _first_tensor((*args, *kwargs.values()))
    batch, frames = (1, images.shape[0]) if images.ndim == 4 else images.shape[:2]
    height, width = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    return batch, TokenLayout(frames, height, width, *numbers)


def _layout_by_function(
    function: Callable[..., tuple[int, TokenLayout]],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[int, TokenLayout]:
    found = function(*args, **kwargs)
    if not (isinstance(found, tuple) and isinstance(found[-1], TokenLayout)):
        raise FamilyError(f"layout= returned {found!r}, expected (batch size, TokenLayout)")
    return found


def _any(root: nn.Module) -> bool:
    return True


def _metadata(numbers: dict[str, int], root: nn.Module) -> dict[str, int]:
    return dict(numbers)


def _find(wanted: Names, root: nn.Module) -> dict[str, nn.Module]:
    found = {name: module for name, module in root.named_modules() if _is_wanted(wanted, name)}
    if not found:
        attentions = [name for name, _ in root.named_modules() if name.endswith("attn")]
        hint = f"; it has {', '.join(attentions[:4])} ..." if attentions else ""
        given = f"'{wanted}'" if isinstance(wanted, str) else getattr(wanted, "__name__", wanted)
        raise FamilyError(
            f"no module of {type(root).__name__} matches {given}: pass the pattern of "
            f"its global attention modules{hint}"
        )
    return found


def _is_wanted(wanted: Names, name: str) -> bool:
    if callable(wanted):
        return bool(wanted(name))
    patterns = (wanted,) if isinstance(wanted, str) else wanted
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _get(name: str, root: nn.Module) -> nn.Module:
    try:
        return root.get_submodule(name)
    except AttributeError as error:
        raise FamilyError(
            f"{type(root).__name__} has no module '{name}': entry= must name the module that "
            "takes the images"
        ) from error


def _first_tensor(values: Iterable[Any]) -> Tensor:
    for value in values:
        if isinstance(value, Tensor):
            if value.ndim in (4, 5):
                return value
            break
    raise LayoutError(
        "the entry module was not given images [B, S, 3, H, W] or [S, 3, H, W] as its first "
        "argument: name another module as entry=, or pass layout="
    )


class _Reduced:
    """Scaled dot-product attention, reduced by a rule; counts its calls."""

    def __init__(self, layout: TokenLayout, rule: ResolvedRule) -> None:
        self.layout = layout
        self.rule = rule
        self.calls = 0

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        self.calls += 1
        tokens = self.layout.tokens
        if query.shape[-2] != tokens or key.shape[-2] != tokens or query.ndim != 4:
            raise LayoutError(
                f"attention over queries {list(query.shape)} and keys {list(key.shape)}, expected "
                f"[B, H, {tokens}, D]: this is not global attention over the whole clip"
            )
        if attn_mask is not None or is_causal or dropout_p > 0 or enable_gqa:
            raise FamilyError(
                "the generic family cannot reduce attention with a mask, dropout, a causal order "
                "or grouped heads: write a family for this model"
            )
        hidden = key.transpose(1, 2).flatten(2)
        selection = select(self.layout, self.rule, query.device, tokens=hidden)
        if selection is not None:
            key, value = selection.take(key, 2), selection.take(value, 2)
        return attend(query, key, value, self.layout, self.rule, selection, scale=scale)


def _reduced_forward(
    attn: nn.Module, layout: TokenLayout, rule: ResolvedRule, *args: Any, **kwargs: Any
) -> Tensor:
    reduced = _Reduced(layout, rule)
    with ReplaceSDPA(reduced):
        output = type(attn).forward(attn, *args, **kwargs)
    if reduced.calls != 1:
        raise FamilyError(
            f"{type(attn).__name__} called scaled_dot_product_attention {reduced.calls} times in "
            "one forward, expected once: write a family for this model"
        )
    return output
