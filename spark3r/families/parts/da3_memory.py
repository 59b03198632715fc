"""Depth-Anything-3's memory savers: one copy of the tokens that the heads read.

The backbone keeps the local and global tokens of four layers side by side, ``[B, S, P, 2C]``, and
then normalises the global half into a second copy of all four. The camera tokens are views of the
first copy, so it lives until the heads are done. Here the camera tokens are copied, and the first
copy of each layer is freed as soon as its second one is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Replacement, overridden
from .memory import by_frames, by_tokens
from .recognition import arguments

_LAYERS = "get_intermediate_layers"
_COLLECT = "_get_intermediate_layers_not_chunked"
_ARGUMENTS = ("x", "n", "export_feat_layers", "kwargs")

_Layers = tuple[tuple[tuple[Tensor, Tensor], ...], list[Tensor]]


def memory_savers(transformer: Any, attention: Iterable[nn.Module]) -> Iterator[Replacement]:
    """Yield the replacements on a backbone's transformer and its blocks.

    Args:
        transformer: Module ``pretrained`` of the backbone.
        attention: Global attention modules.
    """
    whole = set(attention)
    for block in transformer.blocks:
        if block.attn in whole:
            yield from by_tokens(block.mlp)
        else:
            yield from by_frames(block, "pos")
    if _keeps_two_copies(transformer):
        yield transformer, _LAYERS, partial(_layers, transformer)


def _keeps_two_copies(transformer: nn.Module) -> bool:
    kind = type(transformer)
    return (
        getattr(transformer, "cat_token", False)
        and hasattr(kind, _COLLECT)
        and hasattr(kind, _LAYERS)
        and arguments(transformer, _LAYERS) == _ARGUMENTS
        and not overridden(transformer, _COLLECT)
        and not overridden(transformer, _LAYERS)
    )


def _layers(
    self: Any, x: Tensor, n: Any = 1, export_feat_layers: Any = (), **kwargs: Any
) -> _Layers:
    """Return patch tokens ``[B, S, h * w, 2C]`` and camera token ``[B, S, 2C]`` of each layer.

    It replaces the method of upstream's transformer.
    """
    if torch.is_grad_enabled():
        output: _Layers = type(self).get_intermediate_layers(
            self, x, n, export_feat_layers, **kwargs
        )
        return output
    collected, exported = self._get_intermediate_layers_not_chunked(
        x, n, export_feat_layers=export_feat_layers, **kwargs
    )
    width, start = self.embed_dim, 1 + self.num_register_tokens
    layers = []
    while collected:
        camera, tokens = collected.pop(0)
        camera = camera.clone()
        both = torch.cat((tokens[..., :width], self.norm(tokens[..., width:])), dim=-1)
        layers.append((both[..., start:, :], camera))
        del tokens
    return tuple(layers), [self.norm(tokens)[..., start:, :] for tokens in exported]
