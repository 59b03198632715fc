"""Functions of torch that need CUDA's own code, made of operators that a CPU build has.

A pass on fake CUDA tensors (`fake_cuda`) calls these in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from device_waits import is_mask
from torch import Tensor

CUDA = torch.device("cuda", 0)


def _indexed(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Return the view that an index's numbers and slices make, and its tensors by dimension."""
    parts = list(index) if isinstance(index, tuple) else [index]
    for at, part in enumerate(parts):
        if part is Ellipsis:
            used = sum(p.ndim if is_mask(p) else p is not None for p in parts) - 1
            parts[at : at + 1] = [slice(None)] * (tensor.ndim - used)
            break
    aten: Any = torch.ops.aten
    dim, found = 0, dict[int, Tensor]()
    for part in parts:
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, slice):
            if part != slice(None):
                tensor = aten.slice.Tensor(tensor, dim, part.start, part.stop, part.step or 1)
        elif isinstance(part, (Tensor, list)):
            found[dim] = torch.tensor(part, device=CUDA) if isinstance(part, list) else part
            dim += found[dim].ndim - 1 if is_mask(part) else 0
        else:
            tensor, dim = aten.select.int(tensor, dim, int(part)), dim - 1
        dim += 1
    return tensor, [found.get(i) for i in range(max(found, default=-1) + 1)]


def _get(tensor: Tensor, index: Any) -> Tensor:
    view, tensors = _indexed(tensor, index)
    return torch.ops.aten.index.Tensor(view, tensors) if tensors else view


def _set(tensor: Tensor, index: Any, value: Any) -> None:
    view, tensors = _indexed(tensor, index)
    aten: Any = torch.ops.aten
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=tensor.dtype, device=CUDA)
    if tensors:
        aten.index_put_.default(view, tensors, value)
    else:
        aten.copy_.default(view, value.expand(view.shape))


def _copy(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return torch.ops.aten.copy_.default(tensor, source)


def _contiguous(tensor: Tensor, memory_format: Any = torch.contiguous_format) -> Tensor:
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    return torch.ops.aten.clone.default(tensor, memory_format=memory_format)


def _new_tensor(tensor: Tensor, data: Any, **options: Any) -> Tensor:
    return torch.tensor(data, **{"dtype": tensor.dtype, "device": CUDA, **options})


def _nonzero(tensor: Tensor, **_: Any) -> Tensor:
    return torch.ops.aten.nonzero.default(tensor)


def _read(tensor: Tensor) -> Any:
    return torch.ops.aten._local_scalar_dense.default(tensor)


def _interpolate(
    tensor: Tensor, size: Any = None, scale_factor: Any = None, **options: Any
) -> Tensor:
    if options.get("mode") != "bicubic":
        return F.interpolate(tensor, size, scale_factor, **options)
    if size is None:
        pair = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * 2
        size = [int(side * factor) for side, factor in zip(tensor.shape[2:], pair, strict=True)]
    return tensor.new_empty((*tensor.shape[:2], *size))


REPLACED: dict[Any, Callable[..., Any]] = {
    F.interpolate: _interpolate,
    Tensor.__getitem__: _get,
    Tensor.__setitem__: _set,
    Tensor.contiguous: _contiguous,
    Tensor.new_tensor: _new_tensor,
    Tensor.copy_: _copy,
    Tensor.__float__: _read,
    Tensor.__int__: _read,
    Tensor.nonzero: _nonzero,
    torch.nonzero: _nonzero,
}
