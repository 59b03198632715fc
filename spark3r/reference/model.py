"""The reference model: a small feed-forward 3D reconstruction transformer in VGGT's shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..rope import make_rope
from .blocks import Block
from .heads import CameraHead, DepthHead

WIDTH = 128
HEADS = 4
PAIRS = 8
REGISTERS = 4
PATCH_SIZE = 8
STEM_CHANNELS = (32, 64)  # at 1/2 and 1/4 of the resolution
SKIP_CHANNELS = (48, 24)  # at 1/4 and 1/2 of the resolution
FOURIER_BANDS = 4
FRAMES_AT_A_TIME = 64
"""Frames per slice of the stem and the depth head, whose pixels need more memory than tokens."""


class PatchEmbed(nn.Module):
    """Embed each frame with three strided convolutions and an absolute position.

    Args:
        width: Channels of a token, C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half, quarter = STEM_CHANNELS
        self.conv1 = nn.Conv2d(3, half, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(half, quarter, 4, stride=2, padding=1)
        self.conv3 = nn.Conv2d(quarter, width, 4, stride=2, padding=1)
        self.skip_quarter = nn.Conv2d(quarter, SKIP_CHANNELS[0], 1)
        self.skip_half = nn.Conv2d(half, SKIP_CHANNELS[1], 1)
        self.norm = nn.LayerNorm(width)
        self.position = nn.Linear(2 + 4 * FOURIER_BANDS, width)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the patch tokens of frames, and features for the depth head.

        Args:
            images: Normalised colours `[F, 3, H, W]`.

        Returns:
            Patch tokens row by row, `[F, h*w, C]`, and the features at a quarter and at a half of
            the resolution.
        """
        half = F.gelu(self.conv1(images), approximate="tanh")
        quarter = F.gelu(self.conv2(half), approximate="tanh")
        grid = self.conv3(quarter)
        tokens = self.norm(grid.flatten(2).transpose(1, 2))
        features = fourier_grid(grid.shape[-2], grid.shape[-1], images.device)
        position = self.position(features.to(tokens.dtype))
        return tokens + position, (self.skip_quarter(quarter), self.skip_half(half))


def fourier_grid(height: int, width: int, device: torch.device) -> Tensor:
    """Return features of each patch's position in the image, relative to the image's size.

    Args:
        height: Rows of the patch grid.
        width: Columns of the patch grid.
        device: Device of the result.

    Returns:
        fp32 `[h*w, 2 + 4 * FOURIER_BANDS]`: y and x in (-1, 1), their sines and cosines.
    """
    y = (torch.arange(height, device=device, dtype=torch.float32) * 2 + 1) / height - 1
    x = (torch.arange(width, device=device, dtype=torch.float32) * 2 + 1) / width - 1
    yx = torch.stack([y[:, None].expand(height, width), x[None].expand(height, width)], dim=-1)
    yx = yx.reshape(-1, 2)
    waves = [yx * (math.pi * 2.0 ** (band - 1)) for band in range(FOURIER_BANDS)]
    return torch.cat([yx, *(w.sin() for w in waves), *(w.cos() for w in waves)], dim=1)


def pieces(frames: int) -> list[slice]:
    """Return slices of frames for the convolutions, which need most of a long clip's memory.

    Args:
        frames: Number of frames of all clips together.

    Returns:
        Slices of at most `FRAMES_AT_A_TIME` frames. One slice holds all frames with gradients,
        which keep all activations anyway, and in a traced graph, which would unroll the loop.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return [slice(0, frames)]
    starts = range(0, frames, FRAMES_AT_A_TIME)
    return [slice(start, start + FRAMES_AT_A_TIME) for start in starts]


class Aggregator(nn.Module):
    """Alternate attention inside frames and over all frames.

    The first frame has its own camera and register tokens (index 0 of the parameters), all others
    share those of index 1. A frame's tokens are camera, registers, and patches row by row.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patch_size = PATCH_SIZE
        self.patch_start_idx = 1 + REGISTERS
        self.patch_embed = PatchEmbed(WIDTH)
        self.camera_token = nn.Parameter(0.5 * torch.randn(1, 2, 1, WIDTH))
        self.register_token = nn.Parameter(0.5 * torch.randn(1, 2, REGISTERS, WIDTH))
        self.frame_blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(PAIRS))
        self.global_blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(PAIRS))
        self.register_buffer("image_mean", torch.full((1, 3, 1, 1), 0.45), persistent=False)
        self.register_buffer("image_std", torch.full((1, 3, 1, 1), 0.25), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the tokens of a clip, and the stem's features.

        Args:
            images: Images `[B, S, 3, H, W]` in [0, 1]. H and W are multiples of the patch size.

        Returns:
            Tokens `[B, S, P, C]` after the last global block, and the stem's features for the depth
            head, `[B*S, ...]`. Nothing else is kept, so that long clips fit into memory.

        Raises:
            ValueError: If the images have another shape.
        """
        if images.ndim != 5 or images.shape[2] != 3:
            raise ValueError(f"images must be [B, S, 3, H, W], got {list(images.shape)}")
        batch, frames, _, height, width = images.shape
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image sides must be multiples of {self.patch_size}, got {height}x{width}"
            )
        patches, skips = self._embed(images.flatten(0, 1))
        special = torch.cat([self.camera_token, self.register_token], dim=2)  # [1, 2, 5, C]
        others = special[:, 1:].expand(batch, frames - 1, -1, -1)
        special = torch.cat([special[:, :1].expand(batch, 1, -1, -1), others], dim=1)
        x = torch.cat([special.flatten(0, 1), patches], dim=1)  # [B*S, P, C]
        tokens, channels = x.shape[1], x.shape[2]
        rope = make_rope(
            height // self.patch_size,
            width // self.patch_size,
            self.patch_start_idx,
            channels // HEADS,
            images.device,
        )
        global_rope = (rope[0].repeat(frames, 1), rope[1].repeat(frames, 1))
        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = frame_block(x, rope)
            x = global_block(x.reshape(batch, frames * tokens, channels), global_rope)
            x = x.reshape(batch * frames, tokens, channels)
        return x.reshape(batch, frames, tokens, channels), skips

    def _embed(self, frames: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return normalised and embedded frames `[F, 3, H, W]`, computed in slices."""
        dtype = self.camera_token.dtype  # a model in half precision takes fp32 images
        parts = [
            self.patch_embed(((frames[some] - self.image_mean) / self.image_std).to(dtype))
            for some in pieces(len(frames))
        ]
        patches, skips = zip(*parts, strict=True)
        quarter, half = zip(*skips, strict=True)
        return torch.cat(patches), (torch.cat(quarter), torch.cat(half))


class ReferenceModel(nn.Module):
    """Predict depth, confidence and cameras of a clip in one pass.

    Conventions are VGGT's: the world is the first camera, and extrinsics are world-to-camera in
    OpenCV axes. The unit of length is the mean depth of the first frame, because the heads' outputs
    are divided by it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.aggregator = Aggregator()
        self.camera_head = CameraHead(WIDTH)
        self.depth_head = DepthHead(WIDTH, SKIP_CHANNELS)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the reconstruction of a clip.

        Args:
            images: Images `[S, 3, H, W]` or `[B, S, 3, H, W]`, colours in [0, 1]. H and W are
                multiples of 8.

        Returns:
            fp32 tensors: `pose_enc` `[B, S, 9]`, `depth` `[B, S, H, W, 1]` (z in the camera's
            axes), and `depth_conf` `[B, S, H, W]`, which is above 1. B is 1 for images without a
            batch dimension.

        Raises:
            ValueError: If the images have another shape.
        """
        if images.ndim == 4:
            images = images[None]
        tokens, skips = self.aggregator(images)
        batch, frames, _, height, width = images.shape
        patch, start = self.aggregator.patch_size, self.aggregator.patch_start_idx
        patches, grid = tokens[:, :, start:].flatten(0, 1), (height // patch, width // patch)
        raw = torch.cat(
            [
                self.depth_head(patches[some], (skips[0][some], skips[1][some]), grid)
                for some in pieces(len(patches))
            ]
        )
        raw = raw.reshape(batch, frames, 2, height, width)
        depth, pose = torch.exp(raw[:, :, 0, :, :, None]), self.camera_head(tokens[:, :, 0])
        unit = self.unit(depth)
        return {
            "pose_enc": torch.cat([pose[..., :3] / unit[..., 0, 0], pose[..., 3:]], dim=-1),
            "depth": depth / unit,
            "depth_conf": 1.0 + torch.exp(raw[:, :, 1]),
        }

    def unit(self, depth: Tensor) -> Tensor:
        """Return the unit of length of clips, the mean of the first frames' depths.

        Args:
            depth: Depth `[B, S, H, W, 1]`.

        Returns:
            `[B, 1, 1, 1, 1]`.
        """
        return depth[:, :1].mean(dim=(2, 3, 4), keepdim=True)
