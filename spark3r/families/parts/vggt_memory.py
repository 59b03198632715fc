"""VGGT's memory savers: outputs of layers that no head reads are dropped, wide parts run in pieces.

The aggregator keeps the frame and global tokens of every layer side by side in float32, 24 times
2·C numbers per token, but its heads read four layers only. The two halves of an unread layer are
dropped before they are joined. The list keeps its length, an unread entry has the shape
``[B, S, 0, 2C]``, and code that reads it gets an error instead of wrong numbers (`Dropped`). The
heads' outputs stay the same, bit for bit. A traced graph is not cut: its compiler drops what nobody
reads.

`aggregator_memory` says what else is freed in the known version of upstream's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Replacement, overridden
from .aggregator_memory import (
    Layers,
    Version,
    dropped,
    embedded,
    handed_projections,
    own_forwards,
    runs_as_upstream,
)
from .memory import aggregator_in_pieces

_UNREAD = "_spark3r_unread"
_METHODS = ("_process_frame_attention", "_process_global_attention")
VERSION = Version(
    methods=_METHODS,
    forward=frozenset(
        {
            *("shape", "ValueError", "_resnet_mean", "_resnet_std", "view", "patch_embed", "dict"),
            *("isinstance", "slice_expand_and_flatten", "camera_token", "register_token", "torch"),
            *("cat", "rope", "position_getter", "patch_size", "device", "patch_start_idx"),
            *("zeros", "to", "dtype", "range", "aa_block_num", "aa_order", "len", "append"),
            *_METHODS,
        }
    ),
    head="depth_head",
    head_arguments=("aggregated_tokens_list", "images", "patch_start_idx", "frames_chunk_size"),
    head_begins=(
        *("contiguous", "shape", "patch_size", "intermediate_layer_idx", "reshape"),
        *("norm", "permute", "projects"),
    ),
    camera=("token_norm", "trunk_fn"),
)

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
    """Yield the replacements on the aggregator, on its blocks and on the dense head."""
    yield from aggregator_in_pieces(aggregator, aggregator.global_blocks, "pos", passed=("pos",))
    if not all(hasattr(type(aggregator), name) for name in _METHODS):
        return  # another version, which may keep its outputs in another form
    if any(overridden(aggregator, name) for name in _METHODS):
        return  # another library has replaced them
    unread = unread_layers(root, len(aggregator.global_blocks))
    if unread:
        yield aggregator, _UNREAD, unread
        yield aggregator, _METHODS[0], partial(_frame, aggregator)
        yield aggregator, _METHODS[1], partial(_global, aggregator)
    if _is_known(aggregator):
        yield from own_forwards(VERSION, root, aggregator, _forward)


def prediction_savers(root: nn.Module, aggregator: Any) -> Iterator[Replacement]:
    """Yield what lets the aggregator hand projections to the dense head, see `memory_savers`."""
    if _is_known(aggregator):
        yield from handed_projections(VERSION, root, aggregator)


def _is_known(aggregator: Any) -> bool:
    return (
        VERSION.covers(aggregator)
        and aggregator.rope is not None
        and set(aggregator.aa_order) == {"frame", "global"}
    )


def _forward(self: Any, images: Tensor) -> tuple[list[Tensor | None], int]:
    """Return the outputs of all layers and the number of special tokens, as upstream's forward."""
    if runs_as_upstream(self, images):
        output: tuple[list[Tensor | None], int] = type(self).forward(self, images)
        return output
    batch, frames, _, height, width = images.shape
    tokens, start = embedded(self, images), self.patch_start_idx
    shape = (batch, frames, *tokens.shape[1:])
    grid = (height // self.patch_size, width // self.patch_size)
    pos = self.position_getter(batch * frames, *grid, device=images.device)
    if start > 0:
        special = torch.zeros(batch * frames, start, 2, dtype=pos.dtype, device=pos.device)
        pos = torch.cat((special, pos + 1), dim=1)
    layers = Layers(self, images, len(self.global_blocks), start)
    local: list[Tensor] = []
    whole: list[Tensor] = []
    first = second = 0
    for _ in range(self.aa_block_num):
        for kind in self.aa_order:
            if kind == "frame":
                tokens, first, local = self._process_frame_attention(tokens, *shape, first, pos=pos)
            else:
                tokens, second, whole = self._process_global_attention(
                    tokens, *shape, second, pos=pos
                )
        while local:
            layers.take(local.pop(0), whole.pop(0))
    return layers.finished(tokens.view(shape)), start


def _frame(self: Any, *args: Any, **kwargs: Any) -> _Result:
    return _cut(self, type(self)._process_frame_attention(self, *args, **kwargs))


def _global(self: Any, *args: Any, **kwargs: Any) -> _Result:
    return _cut(self, type(self)._process_global_attention(self, *args, **kwargs))


def _cut(aggregator: Any, result: _Result) -> _Result:
    """Return a method's result with the outputs ``[B, S, P, C]`` of unread layers dropped."""
    if torch.compiler.is_compiling():
        return result
    tokens, following, outputs = result
    unread = aggregator.__dict__.get(_UNREAD, ())
    first = following - len(outputs)
    kept = [dropped(out) if first + i in unread else out for i, out in enumerate(outputs)]
    return tokens, following, kept
