"""Small models and images that most tests run on."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import torch
from torch import nn


def make_model(pairs: int = 2, seed: int = 0) -> nn.Module:
    """Return the reference architecture with some layer pairs and random weights."""
    return deepcopy(_made(pairs, seed))


@cache
def _made(pairs: int, seed: int) -> nn.Module:
    from spark3r.reference.model import ReferenceModel

    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    whole = ReferenceModel()
    torch.set_rng_state(generator_state)
    aggregator = whole.aggregator
    aggregator.frame_blocks = aggregator.frame_blocks[:pairs]
    aggregator.global_blocks = aggregator.global_blocks[:pairs]
    return whole.eval()


def make_images(frames: int, height: int = 24, width: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(frames, 3, height, width, generator=generator)
