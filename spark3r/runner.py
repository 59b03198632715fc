"""Passes of a model over a clip, and what they need: device, precision, layout, prediction."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .clips import Clip
from .errors import FamilyError, Spark3rError
from .families.base import Family, unwrap
from .families.registry import detect
from .layout import TokenLayout
from .memory import is_out_of_memory
from .prediction import Prediction

T = TypeVar("T")


class AttentionCall(NamedTuple):
    """A global attention module as it is called in a pass.

    Attributes:
        module: The module.
        args: Its positional arguments, in the precision that they have there.
        kwargs: Its keyword arguments, likewise.
        autocast: Precision of the autocast that it is called under, ``float32`` for none.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype


def run(
    model: nn.Module,
    images: Tensor,
    family: Family | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Return what the model says of one clip, without recording gradients.

    This is where passes run; what is computed from their outputs stays outside autocast.

    Args:
        model: A model of any family.
        images: ``[S, 3, H, W]`` in [0, 1], on any device; rounded to the precision of the model's
            parameters.
        family: What is known of the model; None recognises it.
        dtype: Precision by autocast, ``float32`` for none; None leaves autocast as it is.

    Raises:
        Spark3rError: If the model fails in half precision.
    """
    family = detect(model) if family is None else family
    device, own = device_of(model), dtype_of(model)
    with torch.inference_mode(), autocast(device, dtype):
        try:
            return family.call(model, images.to(device, own))
        except (RuntimeError, TypeError) as error:
            if is_out_of_memory(error) or (running := product_dtype(own, device)) not in HALF:
                raise
            raise Spark3rError(_does_not_run(error, own, running, device)) from error


def predict(
    model: nn.Module,
    clip: Clip,
    family: Family | None = None,
    dtype: torch.dtype | None = None,
) -> Prediction:
    """Return the model's prediction of a clip, on the CPU.

    Args:
        model: A model of any family.
        clip: The clip.
        family: What is known of the model; None recognises it.
        dtype: As `run` takes it.

    Raises:
        FamilyError: If the family does not know how to read the model's output.
        Spark3rError: If the model fails in half precision.
    """
    family = detect(model) if family is None else family
    if family.predict is None:
        raise FamilyError(
            f"family '{family.name}' cannot read the model's output: give its Family a predict= "
            "that makes a spark3r.Prediction of it"
        )
    return family.predict(run(model, clip.images, family, dtype), clip.images).to("cpu")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter, the CPU if it has none."""
    parameter = next(iter(model.parameters()), None)
    return torch.device("cpu") if parameter is None else parameter.device


def layout_of(
    model: nn.Module,
    images: Tensor,
    family: Family | None = None,
    dtype: torch.dtype | None = None,
) -> TokenLayout:
    """Return the token layout of a pass over ``images`` ``[S, 3, H, W]``, without running it all.

    The pass is left as soon as the family's entry module is called. Arguments are those of `run`.
    """
    root = unwrap(model)
    family = detect(root) if family is None else family
    entry = family.entry(root)
    return _seen_at(entry, lambda *call: family.layout(*call)[1], model, images, family, dtype)


def precision_of(
    model: nn.Module,
    images: Tensor,
    family: Family | None = None,
    dtype: torch.dtype | None = None,
) -> torch.dtype:
    """Return the precision that a pass multiplies in where its global attention begins.

    It is asked inside the pass, since some models turn autocast on by themselves (VGGT-Omega). The
    pass is left at the family's entry module. Arguments are those of `run`.
    """
    root = unwrap(model)
    family = detect(root) if family is None else family
    own, device = dtype_of(next(iter(family.attention(root).values()))), device_of(model)
    entry = family.entry(root)
    return _seen_at(entry, lambda *_: product_dtype(own, device), model, images, family, dtype)


def first_attention_call(
    model: nn.Module,
    images: Tensor,
    family: Family | None = None,
    dtype: torch.dtype | None = None,
) -> AttentionCall:
    """Return the call of the first global attention module in a pass.

    The pass is left there, so that a clip whose dense pass would not fit is no obstacle.

    Args:
        model: An unpatched model.
        images: ``[S, 3, H, W]``.
        family: What is known of the model; None recognises it.
        dtype: As `run` takes it.
    """
    root = unwrap(model)
    family = detect(root) if family is None else family
    first = next(iter(family.attention(root).values()))
    device = device_of(model)

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
        return AttentionCall(module, args, kwargs, product_dtype(torch.float32, device))

    return _seen_at(first, look, model, images, family, dtype)


def _seen_at(
    module: nn.Module,
    look: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], T],
    model: nn.Module,
    images: Tensor,
    family: Family,
    dtype: torch.dtype | None,
) -> T:
    """Return what ``look`` sees of a module's call in a pass, which is left there."""
    found: list[T] = []

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(look(module, args, kwargs))
        raise _EnoughSeenError

    hook = module.register_forward_pre_hook(leave, with_kwargs=True, prepend=True)
    try:
        run(model, images, family, dtype)
    except _EnoughSeenError:
        pass
    finally:
        hook.remove()
    return found[0]


def _does_not_run(
    error: Exception, own: torch.dtype, running: torch.dtype, device: torch.device
) -> str:
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    if own in HALF:
        return (
            f"the model does not run on {device.type} with its parameters cast to "
            f"{dtype_name(own)} ({first_line}): leave them in float32 and let dtype say the "
            "precision, which is autocast"
        )
    return (
        f"the model does not run in {dtype_name(running)} on {device.type} ({first_line}): use "
        "float32"
    )


class _EnoughSeenError(Exception):
    """Leaves a forward pass."""


HALF = (torch.bfloat16, torch.float16)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return the context that a pass in this precision runs in.

    Args:
        device: Where the model is.
        dtype: ``bfloat16`` or ``float16`` by autocast; ``float32`` for none, so that the
            parameters' precision counts; None leaves autocast as it is around the call.
    """
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype, enabled=dtype in HALF)


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the precision of the module's first floating-point parameter, float32 without one."""
    parameters = (each.dtype for each in module.parameters() if each.is_floating_point())
    return next(parameters, torch.float32)


def product_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Return the precision that tensors of ``dtype`` are multiplied in, here and now.

    That is their own, unless autocast is on where this is called.
    """
    # Asked of a product itself: how to ask autocast differs between versions of torch.
    one = torch.ones(1, 1, dtype=dtype, device=device)
    return (one @ one).dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a precision as profiles and command lines have it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
