"""Operators in which the host waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
}
"""Operators whose result, or the length of it, the host reads."""

COPIES = {"_to_copy", "copy_"}
"""Operators that may copy between devices."""

_INDEXES = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}


def waits(func: Any, args: Sequence[Any], kwargs: dict[str, Any], output: object) -> str | None:
    """Return why the host waits for the device in an operator, or None if it does not.

    Args:
        func: The operator, an overload.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: What it returned; None if it did not run yet.
    """
    name = func.overloadpacket.__name__
    if name in _READS:
        return f"{name} waits for the device"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "repeat_interleave waits for the device to learn a length"
    if name in _INDEXES and any(map(is_mask, args[1])):
        return "a mask as an index waits for the device"
    if name in COPIES:
        leaves = tree_leaves((args, kwargs, output))
        kinds = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        kinds |= {leaf.type for leaf in leaves if isinstance(leaf, torch.device)}
        if len(kinds) > 1:
            return f"a copy between {' and '.join(sorted(kinds))} waits for the device"
    return None


def is_mask(index: object) -> bool:
    """Return True if an index is a mask, so that its length has to be counted."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
