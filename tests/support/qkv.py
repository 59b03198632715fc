"""Random queries, keys and values, and attention reduced by a rule from all of them."""

from __future__ import annotations

import torch

from spark3r.layout import TokenLayout
from spark3r.reduction.attention import attend
from spark3r.reduction.plans import select


def random_qkv(
    layout: TokenLayout, batch: int = 1, dtype: torch.dtype = torch.float64, seed: int = 0
):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, 2, layout.tokens, 4)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).unbind(0)


def hidden(key):
    """Return keys ``[B, H, N, D]`` as tokens ``[B, N, H * D]``."""
    return key.transpose(1, 2).flatten(2)


def reduced(query, key, value, layout, rule):
    selection = select(layout, rule, query.device, tokens=hidden(key))
    if selection is not None:
        key, value = selection.take(key, 2), selection.take(value, 2)
    return attend(query, key, value, layout, rule, selection)
