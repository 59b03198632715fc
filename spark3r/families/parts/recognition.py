"""Recognising an architecture by the names of its parts, without importing its package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import FamilyError, LayoutError
from ..base import unwrap


def locate(
    root: nn.Module, paths: Iterable[str], test: Callable[[Any], bool]
) -> tuple[str, Any] | None:
    """Return the first module at one of the paths that passes a test, with its path.

    Args:
        root: Module that the paths start from.
        paths: Qualified names, "" for the root itself.
        test: Function that returns True for the module that is sought.
    """
    for path in paths:
        module: Any = root
        for name in path.split(".") if path else ():
            module = getattr(module, name, None)
            if not isinstance(module, nn.Module):
                break
        else:
            module = unwrap(module)
            if test(module):
                return path, module
    return None


def located(
    root: nn.Module, paths: Iterable[str], test: Callable[[Any], bool], model: str
) -> tuple[str, Any]:
    """Return what `locate` returns, for a model of the family.

    Raises:
        FamilyError: If no path leads to such a module, because the user named another family.
    """
    found = locate(root, paths, test)
    if found is None:
        raise FamilyError(
            f"{type(root).__name__} does not have the structure of {model}: name its own family, "
            "or leave the family out and let spark3r recognise it"
        )
    return found


def has(module: object, *names: str) -> bool:
    """Return True if an object has all of these attributes."""
    return all(hasattr(module, name) for name in names)


def attentions(blocks: object) -> list[nn.Module]:
    """Return ``attn`` of every block in a module list, or no module if a block has none.

    Blocks and their attention may be inside wrappers.
    """
    if not isinstance(blocks, nn.ModuleList):
        return []
    found = [getattr(unwrapped(block, "attn"), "attn", None) for block in blocks]
    modules = [unwrapped(attn, "qkv") for attn in found if isinstance(attn, nn.Module)]
    return modules if len(modules) == len(found) else []


def unwrapped(module: nn.Module, part: str) -> nn.Module:
    """Return the module that has a submodule of its own called ``part``.

    It is searched for in the module and in what wrappers with a single submodule have inside. If
    none has it, the module itself is returned.
    """
    inner = module
    while part not in inner._modules:
        children = list(inner.children())
        if len(children) != 1:
            return module
        inner = children[0]
    return inner


def arguments(module: nn.Module, method: str = "forward") -> tuple[str, ...]:
    """Return the names of the arguments of a method of a module's class, without ``self``."""
    return tuple(inspect.signature(getattr(type(module), method)).parameters)[1:]


def names_used(module: nn.Module, method: str) -> tuple[str, ...]:
    """Return the names that a method of a module's class uses, in the order of their first use.

    They tell the versions of upstream's code apart. A method that is no Python function uses none.
    """
    code = getattr(getattr(type(module), method, None), "__code__", None)
    return getattr(code, "co_names", ())


def names_within(module: nn.Module, *methods: str) -> frozenset[str]:
    """Return the names that methods of a module's class use, and functions inside of them.

    A method that is missing, or is no Python function, uses none.
    """
    codes = [getattr(getattr(type(module), name, None), "__code__", None) for name in methods]
    found: set[str] = set()
    while codes:
        code = codes.pop()
        if code is not None:
            found.update(code.co_names)
            codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    return frozenset(found)


def is_fused_attention(module: nn.Module, expected: tuple[str, ...]) -> bool:
    """Return True if a module has one ``qkv`` and its forward takes exactly these arguments."""
    parts = ("qkv", "proj", "q_norm", "k_norm", "num_heads")
    return has(module, *parts) and arguments(module) == expected


def fused_attentions(blocks: object, expected: tuple[str, ...]) -> list[nn.Module]:
    """Return ``attn`` of every block, or no module if one is not of the kind in the name.

    Args:
        blocks: Module list of blocks.
        expected: Names of the arguments of their forward.
    """
    found = attentions(blocks)
    return found if all(is_fused_attention(attn, expected) for attn in found) else []


def unlike(module: nn.Module, expected: tuple[str, ...], model: str) -> str:
    """Return the reason why an attention module is not that of the model it resembles."""
    shown = ", ".join(arguments(module))
    return (
        f"it looks like {model}, but the forward of its global attention "
        f"({type(module).__name__}) takes ({shown}), expected ({', '.join(expected)})"
    )


def refuse_argument(attn: nn.Module, name: str, value: object) -> None:
    """Raise an error if global attention was given an argument that reduction cannot follow.

    Raises:
        FamilyError: If the value is not None.
    """
    if value is not None:
        raise FamilyError(
            f"the global attention of this model ({type(attn).__name__}) was given {name}, which "
            "spark3r cannot reduce: call the model without it, or remove the schedule"
        )


def refuse_dropout(attn: nn.Module) -> None:
    """Raise an error if attention weights would be dropped, which merged queries cannot follow.

    Raises:
        FamilyError: If the module trains with attention dropout.
    """
    share = getattr(getattr(attn, "attn_drop", None), "p", 0.0)
    if attn.training and share:
        raise FamilyError(
            f"{type(attn).__name__} trains with attention dropout {share}, which spark3r cannot "
            "reduce: set it to 0, or remove the schedule"
        )


def refuse_stale_positions(
    cache: Mapping[tuple[int, int], object], grid: tuple[int, int], device: torch.device, where: str
) -> None:
    """Raise an error if the model cached token positions of this grid on another device.

    Upstream's cache has the grid alone as its key, so a model that was moved to another device
    would fail deep inside a block.

    Args:
        cache: Cached positions by patch grid.
        grid: Rows and columns of patches in this pass.
        device: Device of the images.
        where: Qualified name of the cache, for the message.

    Raises:
        LayoutError: If the cached positions are on another device.
    """
    cached = cache.get(grid)
    if isinstance(cached, torch.Tensor) and cached.device != device:
        raise LayoutError(
            f"the model was moved to {device}, but it still holds token positions on "
            f"{cached.device} from an earlier run: clear them with {where}.clear()"
        )


def clip_images(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], keyword: str, entry: str
) -> Tensor:
    """Return the images ``[B, S, 3, H, W]`` that an entry module was called with.

    Args:
        args: Positional arguments of the call, images first.
        kwargs: Keyword arguments of the call.
        keyword: Name of the images among the keyword arguments.
        entry: Name of the entry module in error messages.

    Raises:
        LayoutError: If the images are missing, no tensor, or have another number of dimensions.
    """
    images = args[0] if args else kwargs.get(keyword)
    if not isinstance(images, Tensor):
        given = "no images" if images is None else f"images of type {type(images).__name__}"
        raise LayoutError(
            f"the {entry} was given {given}, expected a tensor [B, S, 3, H, W] "
            f"as its first argument or as {keyword}="
        )
    if images.ndim != 5:
        raise LayoutError(
            f"the {entry} was given images of shape {list(images.shape)}, expected [B, S, 3, H, W]"
        )
    return images
