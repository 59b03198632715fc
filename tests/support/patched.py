"""Schedules to patch with, and what a patch could leave behind."""

from __future__ import annotations

import torch
from torch import nn

from spark3r import LayerRule, LengthRule, Operators, Schedule
from spark3r.reduction.operators import QueryMerging, TokenStride

REDUCED = Schedule(
    (LayerRule(3, 1), LayerRule(2, 3)), Operators(QueryMerging(group=4)), LengthRule(max_frames=100)
)

FAITHFUL = Schedule(
    (LayerRule(1, 4), LayerRule(4, 2)),
    Operators(QueryMerging(unmerge="linear"), TokenStride(keep_anchor=True, mass_correction=1.0)),
)


def depth(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images)["depth"]


def snapshot(model: nn.Module) -> list[tuple[type, list[str], int, int]]:
    """What a patch could leave behind on every module."""
    return [
        (
            type(module),
            sorted(module.__dict__),
            len(module._forward_pre_hooks),
            len(module._forward_hooks) + len(module._forward_hooks_always_called),
        )
        for module in model.modules()
    ]
