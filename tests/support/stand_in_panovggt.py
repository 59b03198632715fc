"""A small model with PanoVGGT's attribute names and call conventions, written for these tests."""

from __future__ import annotations

from typing import Any

import torch
from stand_in_parts import (
    WIDTH,
    Attention,
    Block,
    CameraPoses,
    PatchEmbed,
    Pi3Attention,
    PositionGetter,
    Rotary,
    TokenPixels,
    homogenize_points,
)
from torch import Tensor, nn


class PanoAttention(Pi3Attention):
    def forward(self, x: Tensor, xpos: Tensor | None = None, **kwargs: Any) -> Tensor:
        return super().forward(x, xpos=xpos)


class Positions(PositionGetter):
    """Positions of patches alone, from (0, 0)."""

    def __call__(self, count: int, height: int, width: int, device: torch.device) -> Tensor:
        return super().__call__(count, height, width, 0).to(device) - 1


class Aggregator(nn.Module):
    def __init__(self, attention: type[Attention], blocks: int) -> None:
        super().__init__()
        self.patch_size, self.patch_start_idx, self.use_pano_pos = 14, 2, True
        self.rope, self.position_getter = Rotary("base"), Positions("cache_positions")
        self.patch_embed = PatchEmbed(14)
        self.register_token = nn.Parameter(1e-6 * torch.randn(1, 1, 2, WIDTH))
        self.alpha_pos = nn.Parameter(torch.tensor(0.1))
        self.pano_pos_mlp = nn.Linear(4, WIDTH)
        self.decoder = nn.ModuleList(Block(attention(self.rope)) for _ in range(blocks))

    def embedding(self, height: int, width: int, like: Tensor) -> Tensor:
        rows = torch.linspace(-1, 1, height, device=like.device)[:, None].expand(height, width)
        columns = torch.linspace(-3, 3, width, device=like.device)[None].expand(height, width)
        turns = (rows.sin(), rows.cos(), columns.sin(), columns.cos())
        patches = self.pano_pos_mlp(torch.stack(turns, dim=-1).flatten(0, 1))
        return torch.cat((patches.new_zeros(self.patch_start_idx, WIDTH), patches))

    def forward(self, images: Tensor) -> tuple[list[Tensor], int, Tensor]:
        batch, frames, _, height, width = images.shape
        grid = (height // 14, width // 14)
        x = self.patch_embed(images.flatten(0, 1))
        x = torch.cat((self.register_token[0].expand(batch * frames, -1, -1), x), dim=1)
        pos = self.position_getter(batch * frames, *grid, images.device) + 1
        pos = torch.cat((pos.new_zeros(len(pos), 2, 2), pos), dim=1)
        added, last = self.embedding(*grid, x), []
        for i, block in enumerate(self.decoder):
            count = batch if i % 2 else batch * frames
            repeated = added.repeat(frames if i % 2 else 1, 1)
            x = x.reshape(count, -1, WIDTH) + self.alpha_pos * repeated
            x = block(x, xpos=pos.reshape(count, -1, 2))
            last = [*last[-1:], x.reshape(batch * frames, -1, WIDTH)]
        tokens = torch.cat(last, dim=-1).reshape(batch, frames, -1, 2 * WIDTH)
        return [tokens], self.patch_start_idx, pos


class Decoder(nn.Module):
    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.projects, self.blocks = nn.Linear(2 * WIDTH, WIDTH), Block(Pi3Attention(rope))

    def forward(self, hidden: Tensor, xpos: Tensor, pos_embed: Tensor) -> Tensor:
        return self.blocks(self.projects(hidden) + pos_embed, xpos=xpos)


class PanoVggt(nn.Module):
    def __init__(self, attention: type[Attention] = PanoAttention, blocks: int = 6) -> None:
        super().__init__()
        self.patch_size = 14
        self.enable_point = self.enable_camera = True
        self.aggregator = Aggregator(attention, blocks)
        rope = self.aggregator.rope
        self.point_decoder, self.camera_decoder = Decoder(rope), Decoder(rope)
        self.global_points_decoder = Decoder(rope)
        self.point_head, self.global_point_head = TokenPixels(14, 3), TokenPixels(14, 3)
        self.camera_head = CameraPoses()
        self.register_buffer("_cache_hw", None, persistent=False)

    def _get_branch_pos_embed(
        self, Hp: int, Wp: int, start: int, device: Any, dtype: Any, branch: str, count: int
    ) -> Tensor:
        found = self.aggregator.embedding(Hp, Wp, self.aggregator.register_token)
        return found.to(dtype)[None].expand(count, -1, -1)

    def _get_direction_vectors(self, H: int, W: int, device: Any, dtype: torch.dtype) -> Tensor:
        if self._cache_hw is None or self._cache_hw[0].item() != H:
            self._cache_hw = torch.tensor([H, W], device=device)
        phi = ((torch.arange(W, device=device, dtype=dtype) + 0.5) / W - 0.5) * 2 * torch.pi
        theta = -((torch.arange(H, device=device, dtype=dtype) + 0.5) / H - 0.5) * torch.pi
        theta, phi = torch.meshgrid(theta, phi, indexing="ij")
        x, z = theta.cos() * phi.sin(), theta.cos() * phi.cos()
        return torch.stack((x, -theta.sin(), z), dim=-1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = images if images.ndim == 5 else images[None]
        batch, frames, _, height, width = images.shape
        side, whole = self.patch_size, (batch, frames)
        grid = (height // side, width // side)
        out, start, _ = self.aggregator(images)
        tokens = out[-1].flatten(0, 1)
        pos = self.aggregator.position_getter(len(tokens), *grid, tokens.device) + 1
        pos = torch.cat((pos.new_zeros(len(pos), start, 2), pos), dim=1)

        def decoded(decoder: nn.Module, branch: str) -> Tensor:
            embedding = self._get_branch_pos_embed(
                *grid, start, tokens.device, tokens.dtype, branch, len(tokens)
            )
            return decoder(tokens, xpos=pos, pos_embed=embedding).float()[:, start:]

        found = {}
        everywhere = decoded(self.global_points_decoder, "global")
        if self.enable_point:
            hidden = decoded(self.point_decoder, "point")
            with torch.amp.autocast(device_type="cuda", enabled=False):
                depth = self.point_head([hidden], (height, width))[..., 2].exp()[..., None]
                rays = self._get_direction_vectors(height, width, depth.device, depth.dtype)
                found["local_points"] = (rays * depth).unflatten(0, whole)
                found["depth"] = depth.unflatten(0, whole)
        if self.enable_camera:
            hidden = decoded(self.camera_decoder, "camera")
            with torch.amp.autocast(device_type="cuda", enabled=False):
                poses = self.camera_head(hidden, *grid)
                found["camera_poses"] = poses.unflatten(0, whole)
                local = homogenize_points(found["local_points"])
                world = torch.einsum("bsij,bshwj->bshwi", found["camera_poses"], local)
                found["points"] = world[..., :3]
        with torch.amp.autocast(device_type="cuda", enabled=False):
            points = self.global_point_head([everywhere], (height, width))
            found["global_points"] = points.unflatten(0, whole)
        return found
