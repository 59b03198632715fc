"""A small model with WorldMirror's attribute names and call conventions.

Written for these tests. Upstream takes views, a dictionary with the clip. The stand-in takes the
clip that all families' tests give, ``[B, S, 3, H, W]``, too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from stand_in_parts import (
    HEADS,
    WIDTH,
    Attention,
    Block,
    PatchEmbed,
    PixelHead,
    PositionGetter,
    Rotary,
    VggtAttention,
    first_and_others,
)
from torch import Tensor, nn


def views_of(clip: Any) -> dict[str, Any]:
    """Return a clip ``[B, S, 3, H, W]`` as views; views stay as they are."""
    return {"img": clip} if isinstance(clip, Tensor) else clip


class NormalisedRotary(nn.Module):
    """Rotation by positions that are normalised to the grid, all of a head against its half."""

    def __init__(self, normalize_coords: str = "separate") -> None:
        super().__init__()
        self.normalize_coords = normalize_coords
        self.shift_coords = self.jitter_coords = self.rescale_coords = None
        size = WIDTH // HEADS
        self.register_buffer("periods", 100.0 ** (2 * torch.arange(size // 4) / (size // 2)))

    def _get_sincos_for_grid(
        self, height: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        by = {"separate": (height, width), "max": (max(height, width),) * 2}[self.normalize_coords]
        rows = torch.arange(0.5, height, device=device, dtype=dtype) / by[0]
        columns = torch.arange(0.5, width, device=device, dtype=dtype) / by[1]
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
        place = 2.0 * place - 1.0
        angle = (2 * math.pi * place[..., None] / self.periods.to(dtype)).flatten(1)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.sin(), angle.cos()

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        height, width = (int(positions[..., axis].max()) + 1 for axis in (0, 1))
        tables = self._get_sincos_for_grid(height, width, tokens.device, tokens.dtype)
        place = positions[..., 0] * width + positions[..., 1]
        sin, cos = (table[place][:, None] for table in tables)
        first, second = tokens.chunk(2, dim=-1)
        return tokens * cos + torch.cat((-second, first), dim=-1) * sin


class AttentionOf2(VggtAttention):
    def _compute_qkv(self, x: Tensor) -> None:
        raise NotImplementedError


class VisualGeometryTransformer(nn.Module):
    def __init__(self, attention: type[Attention], rope: nn.Module, pairs: int) -> None:
        super().__init__()
        self.patch_size, self.patch_start_idx = 14, 4
        self.rope, self.pos_getter = rope, PositionGetter("position_cache")
        self.patch_embed = PatchEmbed(14)
        self.cam_token = nn.Parameter(1e-6 * torch.randn(1, 2, 1, WIDTH))
        self.reg_token = nn.Parameter(1e-6 * torch.randn(1, 2, 2, WIDTH))
        self.frame_blocks = nn.ModuleList(Block(attention(rope)) for _ in range(pairs))
        self.global_blocks = nn.ModuleList(Block(attention(rope)) for _ in range(pairs))

    def forward(self, images: Tensor) -> tuple[list[Tensor], int]:
        batch, frames, _, height, width = images.shape
        x = self.patch_embed(images.flatten(0, 1))
        special = [first_and_others(t, batch, frames) for t in (self.cam_token, self.reg_token)]
        x = torch.cat([*special, x.new_zeros(len(x), 1, WIDTH), x], dim=1)
        pos = self.pos_getter(batch * frames, height // 14, width // 14, 4)
        outputs = []
        for local, whole in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = local(x.reshape(batch * frames, -1, WIDTH), pos=pos)
            before = x.reshape(batch, frames, -1, WIDTH)
            x = whole(x.reshape(batch, -1, WIDTH), pos=pos.reshape(batch, -1, 2))
            outputs.append(torch.cat((before, x.reshape(before.shape)), dim=-1))
        return outputs[-2:], self.patch_start_idx


class DenseHead(PixelHead):
    def forward(self, tokens: list[Tensor], images: Tensor, patch_start_idx: int) -> Any:
        last = sum(tokens)[:, :, patch_start_idx:, WIDTH:]
        maps = super().forward(last, *images.shape[-2:])
        return maps[..., :-1].exp(), 1 + maps[..., -1].exp()


class CameraHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_norm, self.project = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, 9)

    def forward(self, feat_seq: list[Tensor]) -> list[Tensor]:
        return [self.project(self.token_norm(feat_seq[-1][:, :, 0]))]


class WorldMirror(nn.Module):
    def __init__(
        self,
        attention: type[Attention] = AttentionOf2,
        rope: nn.Module | None = None,
        pairs: int = 3,
    ) -> None:
        super().__init__()
        self.enable_cam = self.enable_depth = self.enable_norm = True
        self.visual_geometry_transformer = VisualGeometryTransformer(
            attention, rope or NormalisedRotary(), pairs
        )
        self.cam_head = CameraHead()
        self.depth_head, self.norm_head = DenseHead(14, 2), DenseHead(14, 4)

    def forward(self, views: Any) -> dict[str, Tensor]:
        views = views_of(views)
        tokens, start = self.visual_geometry_transformer(views["img"])
        return self._gen_all_preds(tokens, views["img"], start, views)

    def _gen_all_preds(
        self, tokens: list[Tensor], images: Tensor, start: int, views: Any
    ) -> dict[str, Tensor]:
        found = {}
        if self.enable_cam:
            poses = self.transform_camera_vector(self.cam_head(tokens)[-1], *images.shape[-2:])
            found["camera_poses"], found["camera_intrs"] = poses
        if self.enable_depth:
            found["depth"], found["depth_conf"] = self.depth_head(
                tokens, images=images, patch_start_idx=start
            )
        if self.enable_norm:
            normals = self.norm_head(tokens, images=images, patch_start_idx=start)
            found["normals"], found["normals_conf"] = normals
        return found

    def transform_camera_vector(self, params: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
        extrinsics, intrinsics = vector_to_camera_matrices(params, image_hw=(h, w))
        last = torch.tensor([0, 0, 0, 1], device=params.device).view(1, 1, 1, 4)
        last = last.repeat(*params.shape[:2], 1, 1)
        return torch.linalg.inv(torch.cat((extrinsics, last), dim=2)), intrinsics


def vector_to_camera_matrices(params: Tensor, image_hw: Any) -> tuple[Tensor, Tensor]:
    """Return world-to-camera ``[B, S, 3, 4]`` and intrinsics ``[B, S, 3, 3]`` of ``[B, S, 9]``."""
    away = params.new_zeros(4)
    away[3] = 3.0
    x, y, z, w = F.normalize(params[..., 3:7] + away, dim=-1).unbind(-1)
    rotation = torch.stack(
        (
            *(1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
            *(2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
            *(2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
        ),
        dim=-1,
    ).unflatten(-1, (3, 3))
    height, width = image_hw
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    focal = 40.0 + params[..., 7].tanh()
    rows = (focal, zero, one * width / 2, zero, focal, one * height / 2, zero, zero, one)
    return (
        torch.cat((rotation, params[..., :3, None]), dim=-1),
        torch.stack(rows, dim=-1).unflatten(-1, (3, 3)),
    )


def version_1() -> nn.Module:
    """Return the stand-in of version 1, whose attention and positions are VGGT's."""
    return WorldMirror(VggtAttention, Rotary("base_frequency"))
