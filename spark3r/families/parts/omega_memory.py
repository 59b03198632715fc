"""VGGT-Omega's memory savers: see `aggregator_memory`. Upstream keeps four layers by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Replacement
from .aggregator_memory import (
    Layers,
    Version,
    embedded,
    handed_projections,
    own_forwards,
    runs_as_upstream,
)
from .memory import aggregator_in_pieces

_METHODS = ("_run_frame_block", "_run_inter_frame_attention_block")
VERSION = Version(
    methods=_METHODS,
    forward=frozenset(
        {
            *("shape", "ValueError", "_resnet_mean", "_resnet_std", "view", "patch_embed", "dict"),
            *("slice_expand_and_flatten", "camera_token", "register_token", "isinstance", "torch"),
            *("cat", "patch_size", "no_grad", "rope_embed", "to", "device", "float32", "range"),
            *("depth", "inter_frame_attention_types", "cached_layer_indices", "append"),
            *("patch_token_start", *_METHODS),
        }
    ),
    head="dense_head",
    head_arguments=("aggregated_tokens_list", "images", "patch_token_start", "frames_chunk_size"),
    head_begins=(
        *("contiguous", "shape", "patch_size", "enumerate", "intermediate_layer_idx"),
        *("ValueError", "dtype", "torch", "float32", "float", "reshape", "norm", "permute"),
        "projects",
    ),
    camera=(
        *("ValueError", "shape", "dtype", "torch", "float32", "float", "token_norm", "reshape"),
        *("trunk", "trunk_norm", "_apply_camera_activation", "camera_branch"),
    ),
)


def memory_savers(
    root: nn.Module, aggregator: Any, whole: Iterable[nn.Module]
) -> Iterator[Replacement]:
    """Yield the replacements on the aggregator, on its blocks and on the dense head.

    Args:
        root: Whole model.
        aggregator: Its aggregator.
        whole: Blocks that attend over all frames.
    """
    yield from aggregator_in_pieces(aggregator, whole, passed=("rope",))
    if VERSION.covers(aggregator):
        yield from own_forwards(VERSION, root, aggregator, _forward)


def prediction_savers(root: nn.Module, aggregator: Any) -> Iterator[Replacement]:
    """Yield what lets the aggregator hand projections to the dense head, see `memory_savers`."""
    if VERSION.covers(aggregator):
        yield from handed_projections(VERSION, root, aggregator)


def _forward(self: Any, images: Tensor) -> tuple[list[Tensor | None], int]:
    """Return the outputs of all layers and the number of special tokens, as upstream's forward."""
    if runs_as_upstream(self, images):
        output: tuple[list[Tensor | None], int] = type(self).forward(self, images)
        return output
    batch, frames, _, height, width = images.shape
    tokens, start = embedded(self, images), self.patch_token_start
    shape = (batch, frames, *tokens.shape[1:])
    sin, cos = self.rope_embed(H=height // self.patch_size, W=width // self.patch_size)
    rope = tuple(each.to(device=tokens.device, dtype=torch.float32) for each in (sin, cos))
    layers = Layers(self, images, self.depth, start)
    for i in range(self.depth):
        tokens, local = self._run_frame_block(tokens, *shape, i, rope)
        kind = self.inter_frame_attention_types[i]
        tokens = self._run_inter_frame_attention_block(tokens, *shape, i, kind)
        if i in self.cached_layer_indices:
            layers.take(local, tokens)
        else:
            layers.skip()
        del local
    return layers.finished(tokens), start
