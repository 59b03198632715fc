"""LingBot-Map's stage-1 checkpoint: VGGT's architecture, whose cameras are camera-to-world.

Nothing in the checkpoint says so, and VGGT's are world-to-camera. So the weights' name decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import quaternion_to_matrix

NAME = "lingbot"
"""Part of the name of these weights, and of their repository."""


def read_cameras(model: nn.Module) -> None:
    """Let a VGGT with these weights return world-to-camera poses, as all others do."""
    model.register_forward_hook(_turned)


def _turned(model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, dict) and "pose_enc" in output:
        return {**output, "pose_enc": inverse(output["pose_enc"])}
    return output


def inverse(encoding: Tensor) -> Tensor:
    """Return VGGT's pose encodings ``[..., 9]`` of the inverse poses; fields of view stay."""
    position, turn, view = encoding.split([3, 4, 2], dim=-1)
    back = torch.cat((-turn[..., :3], turn[..., 3:]), dim=-1)
    moved = -(quaternion_to_matrix(back) @ position[..., None].float())[..., 0]
    return torch.cat((moved.to(encoding.dtype), back, view), dim=-1)
