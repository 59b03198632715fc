"""VGGT's memory savers: outputs of layers that no head reads are dropped, wide parts run in pieces.

The aggregator keeps the frame and global tokens of every layer side by side in float32, 24 times
2·C numbers per token, but its heads read four layers only. The two halves of an unread layer are
cut to no tokens before they are joined. The list keeps its length, an unread entry has the shape
``[B, S, 0, 2C]``, and code that reads it gets an error instead of wrong numbers. The heads' outputs
stay the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..base import Replacement
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
    if any(name in aggregator.__dict__ for name in _METHODS):
        return  # another library has replaced them
    unread = unread_layers(root, len(aggregator.global_blocks))
    if unread:
        yield aggregator, _UNREAD, unread
        yield aggregator, _METHODS[0], MethodType(_frame, aggregator)
        yield aggregator, _METHODS[1], MethodType(_global, aggregator)


def _frame(self: Any, *args: Any, **kwargs: Any) -> _Result:
    return _cut(self, type(self)._process_frame_attention(self, *args, **kwargs))


def _global(self: Any, *args: Any, **kwargs: Any) -> _Result:
    return _cut(self, type(self)._process_global_attention(self, *args, **kwargs))


def _cut(aggregator: Any, result: _Result) -> _Result:
    """Return a method's result with the outputs ``[B, S, P, C]`` of unread layers emptied."""
    tokens, following, outputs = result
    unread = aggregator.__dict__[_UNREAD]
    first = following - len(outputs)
    kept = [out[:, :, :0] if first + i in unread else out for i, out in enumerate(outputs)]
    return tokens, following, kept
