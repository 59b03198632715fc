"""The precision of a pass: that of the model's parameters, unless autocast lowers it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

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
