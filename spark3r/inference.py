"""Passes of a model over a clip, and what they need: device, layout, prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .clips import Clip
from .errors import FamilyError
from .families import Family, detect, unwrap
from .layout import TokenLayout
from .prediction import Prediction


def run(model: nn.Module, images: Tensor, family: Family | None = None) -> Any:
    """Return what the model says of one clip, without recording gradients.

    Args:
        model: A model of any family.
        images: ``[S, 3, H, W]`` in [0, 1], on any device; rounded to the precision of the model's
            parameters.
        family: What is known of the model; None recognises it.
    """
    family = detect(model) if family is None else family
    with torch.inference_mode():
        return family.call(model, images.to(device_of(model), dtype_of(model)))


def predict(model: nn.Module, clip: Clip, family: Family | None = None) -> Prediction:
    """Return the model's prediction of a clip, on the CPU.

    Raises:
        FamilyError: If the family does not know how to read the model's output.
    """
    family = detect(model) if family is None else family
    if family.predict is None:
        raise FamilyError(
            f"family '{family.name}' cannot read the model's output: give its Family a predict= "
            "that makes a spark3r.Prediction of it"
        )
    return family.predict(run(model, clip.images, family), clip.images).to("cpu")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter, the CPU if it has none."""
    parameter = next(iter(model.parameters()), None)
    return torch.device("cpu") if parameter is None else parameter.device


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the precision of the model's first floating-point parameter, float32 without one."""
    parameters = (each.dtype for each in model.parameters() if each.is_floating_point())
    return next(parameters, torch.float32)


def layout_of(model: nn.Module, images: Tensor, family: Family | None = None) -> TokenLayout:
    """Return the token layout of a pass over ``images`` ``[S, 3, H, W]``, without running it all.

    The pass is left as soon as the family's entry module is called.
    """
    root = unwrap(model)
    family = detect(root) if family is None else family
    found: list[TokenLayout] = []

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(family.layout(module, args, kwargs)[1])
        raise _EnoughSeenError

    hook = family.entry(root).register_forward_pre_hook(leave, with_kwargs=True, prepend=True)
    try:
        run(model, images, family)
    except _EnoughSeenError:
        pass
    finally:
        hook.remove()
    return found[0]


def first_attention_call(
    model: nn.Module, images: Tensor, family: Family | None = None
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return the first global attention module of a pass, and the arguments it is called with.

    The pass is left there, so that a clip whose dense pass would not fit is no obstacle.

    Args:
        model: An unpatched model.
        images: ``[S, 3, H, W]``.
        family: What is known of the model; None recognises it.
    """
    root = unwrap(model)
    family = detect(root) if family is None else family
    first = next(iter(family.attention(root).values()))
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _EnoughSeenError

    hook = first.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        run(model, images, family)
    except _EnoughSeenError:
        pass
    finally:
        hook.remove()
    args, kwargs = found[0]
    return first, args, kwargs


class _EnoughSeenError(Exception):
    """Leaves a forward pass."""
