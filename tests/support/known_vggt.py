"""A small model whose aggregator and heads use the names that those of upstream's VGGT use.

Written for these tests. The families' memory savers recognise a version of upstream's code by these
names, so they replace the forwards of this model as they do upstream's.
"""

from __future__ import annotations

from typing import Any

import torch
from stand_in_parts import WIDTH, pose_encoding
from stand_in_parts import first_and_others as slice_expand_and_flatten
from stand_ins import VggtAggregator
from torch import Tensor, nn

LAYERS = 4
SPECIAL = 3


class Positions:
    """Positions ``[count, h * w, 2]`` of patches, from (0, 0)."""

    def __init__(self) -> None:
        self.position_cache: dict[tuple[int, int], Tensor] = {}

    def __call__(self, count: int, height: int, width: int, device: torch.device) -> Tensor:
        if (height, width) not in self.position_cache:
            rows, columns = torch.arange(height), torch.arange(width)
            self.position_cache[height, width] = torch.cartesian_prod(rows, columns)
        return self.position_cache[height, width].expand(count, -1, -1).clone()


class Aggregator(VggtAggregator):
    def __init__(self) -> None:
        super().__init__(pairs=LAYERS)
        self.position_getter: Any = Positions()
        self.aa_order, self.aa_block_num = ["frame", "global"], LAYERS
        self.register_buffer("_resnet_mean", torch.full((1, 1, 3, 1, 1), 0.45))
        self.register_buffer("_resnet_std", torch.full((1, 1, 3, 1, 1), 0.25))

    def forward(self, images: Tensor) -> tuple[list[Tensor], int]:
        batch, frames, channels, height, width = images.shape
        if channels != 3:
            raise ValueError("images have three channels")
        images = ((images - self._resnet_mean) / self._resnet_std).view(-1, 3, height, width)
        x = self.patch_embed(images)
        if isinstance(x, dict):
            x = x["x_norm_patchtokens"]
        camera = slice_expand_and_flatten(self.camera_token, batch, frames)
        register = slice_expand_and_flatten(self.register_token, batch, frames)
        x = torch.cat((camera, register, x), dim=1)
        grid = (height // self.patch_size, width // self.patch_size)
        if self.rope is not None:
            pos = 1 + self.position_getter(len(x), *grid, device=images.device)
        none = torch.zeros(len(x), self.patch_start_idx, 2).to(pos.dtype)
        pos = torch.cat((none, pos), dim=1)
        outputs: list[Tensor] = []
        shape = (batch, frames, *x.shape[1:])
        for i in range(self.aa_block_num):
            for kind in self.aa_order:
                if kind == "frame":
                    x, _, local = self._process_frame_attention(x, *shape, i, pos=pos)
                else:
                    x, _, whole = self._process_global_attention(x, *shape, i, pos=pos)
            for k in range(len(local)):
                outputs.append(torch.cat((local[k], whole[k]), dim=-1))
        return outputs, self.patch_start_idx


class CameraHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_norm, self.proj = nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, aggregated_tokens_list: list[Tensor]) -> Tensor:
        tokens = self.token_norm(aggregated_tokens_list[-1][:, :, 0])
        return self.trunk_fn(tokens)

    def trunk_fn(self, tokens: Tensor) -> Tensor:
        return pose_encoding(self.proj(tokens))


class DenseHead(nn.Module):
    """A head on some frames at a time, whose maps depend on four layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.patch_size, self.intermediate_layer_idx = 14, [0, 2, 2, -1]
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.projects = nn.ModuleList(nn.Conv2d(2 * WIDTH, 6 + i, 1) for i in range(4))
        self.last = nn.Conv2d(6 + 7 + 8 + 9, channels, 3, padding=1)

    def forward(
        self,
        aggregated_tokens_list: list[Tensor],
        images: Tensor,
        patch_start_idx: int,
        frames_chunk_size: int = 5,
    ) -> Tensor:
        frames = images.shape[1]
        if frames_chunk_size >= frames:
            return self._forward_impl(aggregated_tokens_list, images, patch_start_idx)
        parts = []
        for first in range(0, frames, frames_chunk_size):
            last = min(first + frames_chunk_size, frames)
            own = (aggregated_tokens_list, images, patch_start_idx, first, last)
            parts.append(self._forward_impl(*own))
        return torch.cat(parts, dim=1)

    def _forward_impl(
        self,
        layers: list[Tensor],
        images: Tensor,
        start: int,
        first: int | None = None,
        last: int | None = None,
    ) -> Tensor:
        images = images[:, first:last].contiguous()
        batch, frames, _, height, width = images.shape
        grid = (height // self.patch_size, width // self.patch_size)
        maps: list[Tensor] = []
        for layer in self.intermediate_layer_idx:
            x = layers[layer][:, :, start:][:, first:last]
            x = x.reshape(batch * frames, -1, x.shape[-1])
            x = self.norm(x)
            x = x.permute(0, 2, 1).reshape(x.shape[0], x.shape[-1], *grid)
            x = self.projects[len(maps)](x)
            maps.append(x)
        x = nn.functional.interpolate(self.last(torch.cat(maps, dim=1)), (height, width))
        return x.permute(0, 2, 3, 1).unflatten(0, (batch, frames))


class KnownVggt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aggregator, self.camera_head = Aggregator(), CameraHead()
        self.depth_head = DenseHead(2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        layers, start = self.aggregator(images)
        with torch.autocast("cuda", enabled=False):
            pose = self.camera_head(layers)
            maps = self.depth_head(layers, images=images, patch_start_idx=start)
        depth, confidence = maps[..., :1].exp(), 1 + maps[..., 1].exp()
        return {"pose_enc": pose, "depth": depth, "depth_conf": confidence}
