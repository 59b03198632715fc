"""Heads that turn tokens into depth and cameras, one frame at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Typical field of view of the training scenes. The head predicts the logarithm of a factor to it.
TYPICAL_FOV_RAD = 1.1


class CameraHead(nn.Module):
    """Predict VGGT's pose encoding from each frame's camera token.

    Args:
        width: Channels of a token, C.
        hidden: Hidden channels of the MLP, 256 by default.
    """

    identity: Tensor

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 9)
        identity = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
        self.register_buffer("identity", identity, persistent=False)

    def forward(self, camera_tokens: Tensor) -> Tensor:
        """Return predicted poses and fields of view.

        The world is the first camera, so the pose of frame 0 is set to the identity. Its field of
        view is predicted like the others.

        Args:
            camera_tokens: Camera tokens `[B, S, C]`.

        Returns:
            Pose encoding, fp32 `[B, S, 9]`: translation (unit: the model's own scale), unit
            quaternion XYZW of the camera-from-world rotation, vertical and horizontal field of view
            in radians.
        """
        x = F.gelu(self.fc1(self.norm(camera_tokens)), approximate="tanh")
        x = x + F.gelu(self.fc2(x), approximate="tanh")
        raw = self.out(x).float()
        pose = raw[..., :7] + self.identity
        quaternion = F.normalize(pose[..., 3:], dim=-1)
        pose = torch.cat([pose[..., :3], quaternion], dim=-1)
        first = self.identity.expand_as(pose[:, :1])
        pose = torch.cat([first, pose[:, 1:]], dim=1)
        fov = TYPICAL_FOV_RAD * torch.exp(raw[..., 7:].clamp(-2.0, 1.0))
        return torch.cat([pose, fov], dim=-1)


class DepthHead(nn.Module):
    """Upsample patch tokens to pixels with the stem's features as skip connections.

    Args:
        width: Channels of a token, C.
        skip_channels: Channels of the stem's features at 1/4 and 1/2 of the resolution.
    """

    def __init__(self, width: int, skip_channels: tuple[int, int]) -> None:
        super().__init__()
        quarter, half = skip_channels
        self.norm = nn.LayerNorm(width)
        self.to_quarter = nn.Linear(width, 4 * quarter)
        self.conv_quarter = nn.Conv2d(quarter, quarter, 3, padding=1)
        self.to_half = nn.Conv2d(quarter, 4 * half, 1)
        self.conv_half = nn.Conv2d(half, half, 3, padding=1)
        self.to_full = nn.Conv2d(half, 4 * 2, 1)

    def forward(
        self, patches: Tensor, skips: tuple[Tensor, Tensor], grid: tuple[int, int]
    ) -> Tensor:
        """Return predicted log depth and log confidence.

        Args:
            patches: Patch tokens of F frames row by row, `[F, h*w, C]`.
            skips: Stem features `[F, C4, 2h, 2w]` and `[F, C2, 4h, 4w]`.
            grid: Rows and columns (h, w) of the patch grid.

        Returns:
            fp32 `[F, 2, 8h, 8w]`: logarithm of depth, logarithm of (confidence - 1).
        """
        x = self.to_quarter(self.norm(patches)).transpose(1, 2).unflatten(2, grid)
        x = F.pixel_shuffle(x, 2) + skips[0]
        x = x + F.gelu(self.conv_quarter(x), approximate="tanh")
        x = F.pixel_shuffle(self.to_half(x), 2) + skips[1]
        x = x + F.gelu(self.conv_half(x), approximate="tanh")
        return F.pixel_shuffle(self.to_full(x), 2).float()
