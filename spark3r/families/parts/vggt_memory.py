"""VGGT's memory savers: outputs of layers that no head reads are dropped, wide parts run in pieces.

The aggregator keeps the frame and global tokens of every layer side by side in float32, 24 times
2·C numbers per token, but its heads read four layers only. The two halves of an unread layer are
cut to no tokens before they are joined. The list keeps its length, an unread entry has the shape
``[B, S, 0, 2C]``, and code that reads it gets an error instead of wrong numbers (`Dropped`). The
heads' outputs stay the same, bit for bit. A traced graph is not cut: its compiler drops what nobody
reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LayoutError
from ..base import Replacement, overridden
from .memory import aggregator_in_pieces

_UNREAD = "_spark3r_unread"
_METHODS = ("_process_frame_attention", "_process_global_attention")

_Result = tuple[Tensor, int, list[Tensor]]


def unread_layers(root: nn.Module, layers: int) -> frozenset[int]:
    """Return the layers whose outputs no head reads. It is empty if no dense head is found.

    Args:
        root: Whole model. Every head counts, the tracker's too.
        layers: Number of pairs of frame and global attention.
    """
    read = {layers - 1}  # by the camera head
    dense_heads = 0
    for module in root.modules():
        chosen = getattr(module, "intermediate_layer_idx", None)
        if chosen is not None:
            dense_heads += 1
            read.update(index % layers for index in chosen)
    return frozenset(range(layers)) - read if dense_heads else frozenset()


def memory_savers(root: nn.Module, aggregator: Any) -> Iterator[Replacement]:
    """Yield the replacements on the aggregator and its blocks."""
    yield from aggregator_in_pieces(aggregator, aggregator.global_blocks, "pos")
    if not all(hasattr(type(aggregator), name) for name in _METHODS):
        return  # another version, which may keep its outputs in another form
    if any(overridden(aggregator, name) for name in _METHODS):
        return  # another library has replaced them
    unread = unread_layers(root, len(aggregator.global_blocks))
    if unread:
        yield aggregator, _UNREAD, unread
        yield aggregator, _METHODS[0], partial(_frame, aggregator)
        yield aggregator, _METHODS[1], partial(_global, aggregator)


class Dropped(Tensor):
    """Tokens ``[B, S, 0, C]`` in the place of those that were dropped.

    They may be moved, cast, joined and asked for their shape. A mean over no tokens would be NaN,
    so whatever would make numbers of them raises a LayoutError.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        made = result if isinstance(result, (tuple, list)) else (result,)
        if all(_has_no_numbers(each) for each in made):
            return result
        raise LayoutError(
            "these are tokens of a layer that no head of the model reads, and the memory saver has "
            "dropped them: apply the schedule with save_memory=False to read them"
        )


def _has_no_numbers(result: object) -> bool:
    if isinstance(result, Tensor):
        return 0 in result.shape
    return result is None or isinstance(result, _FACTS)


_FACTS = (bool, int, str, torch.dtype, torch.device, torch.layout, torch.UntypedStorage)
"""Types of what a tensor tells without its numbers."""


def _frame(self: Any, *args: Any, **kwargs: Any) -> _Result:
    return _cut(self, type(self)._process_frame_attention(self, *args, **kwargs))


def _global(self: Any, *args: Any, **kwargs: Any) -> _Result:
    return _cut(self, type(self)._process_global_attention(self, *args, **kwargs))


def _cut(aggregator: Any, result: _Result) -> _Result:
    """Return a method's result with the outputs ``[B, S, P, C]`` of unread layers emptied."""
    if torch.compiler.is_compiling():
        return result
    tokens, following, outputs = result
    unread = aggregator.__dict__.get(_UNREAD, ())
    first = following - len(outputs)
    kept = [
        out[:, :, :0].as_subclass(Dropped) if first + i in unread else out
        for i, out in enumerate(outputs)
    ]
    return tokens, following, kept
