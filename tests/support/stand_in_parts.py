"""Parts of the stand-ins: rotary embedding, attentions, blocks, heads.

Written for these tests, with upstream's attribute names and call conventions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spark3r.runner import matmul_dtype

WIDTH, HEADS = 32, 2


class Rotary(nn.Module):
    """Rotation by integer positions [B, N, 2], with rows in the first half of a head."""

    def __init__(self, name: str) -> None:
        super().__init__()
        setattr(self, name, 100.0)
        cache = "frequency_cache" if name == "base_frequency" else "cache"
        setattr(self, cache, {})

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        half = tokens.shape[-1] // 2
        count = int(positions.max()) + 1
        inverse = 1.0 / 100.0 ** (torch.arange(0, half, 2).float() / half)
        angle = torch.outer(torch.arange(count).float(), inverse).to(tokens.dtype)
        angle = torch.cat((angle, angle), dim=-1)
        turned = []
        for part, axis in zip(tokens.chunk(2, dim=-1), (0, 1), strict=True):
            cos = F.embedding(positions[..., axis], angle.cos())[:, None]
            sin = F.embedding(positions[..., axis], angle.sin())[:, None]
            first, second = part.chunk(2, dim=-1)
            turned.append(part * cos + torch.cat((-second, first), dim=-1) * sin)
        return torch.cat(turned, dim=-1)


class MaskedBiasLinear(nn.Linear):
    """A linear layer with a masked bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        mask = torch.ones(3, outputs // 3)
        mask[1] = 0
        self.register_buffer("bias_mask", mask.flatten())

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.weight, self.bias * self.bias_mask)


class Attention(nn.Module):
    """The common part of the four families' attentions."""

    def __init__(
        self,
        rope: nn.Module | None = None,
        linear: type[nn.Linear] = nn.Linear,
        width: int | None = None,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        width, heads = width or WIDTH, heads or HEADS
        self.num_heads = heads
        self.qkv = linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.proj = nn.Linear(width, width)
        self.rope = rope

    def run(self, x: Tensor, positions: Tensor | None) -> Tensor:
        parts = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        if self.rope is not None and positions is not None:
            query, key = self.rope(query, positions), self.rope(key, positions)
        output = F.scaled_dot_product_attention(query, key, value)
        output = self.proj(output.transpose(1, 2).reshape(x.shape))
        return self.proj_drop(output) if hasattr(self, "proj_drop") else output


class VggtAttention(Attention):
    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return self.run(x, pos)


class MergingAttention(Attention):
    def forward(self, x: Tensor, pos: Tensor | None = None, global_merging: Any = None) -> Tensor:
        return self.run(x, pos)


class Da3Attention(Attention):
    def forward(self, x: Tensor, pos: Tensor | None = None, attn_mask: Any = None) -> Tensor:
        return self.run(x, pos)


class Pi3Attention(Attention):
    def forward(self, x: Tensor, attn_bias: Any = None, xpos: Tensor | None = None) -> Tensor:
        half = matmul_dtype(torch.float32, "cpu") != torch.float32
        exact = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION] if half else exact):
            return self.run(x, xpos)


class OmegaAttention(Attention):
    def forward(self, x: Tensor, attn_bias: Any = None, rope: Any = None) -> Tensor:
        return self.run(x, None)


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.ls1, self.ls2 = attn, LayerScale(), LayerScale()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, **positions: Any) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), **positions))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PositionGetter:
    """Positions cached by grid alone, under the attribute name that the family expects."""

    def __init__(self, cache: str) -> None:
        self.cache = cache
        setattr(self, cache, {})

    def __call__(self, count: int, height: int, width: int, special: int) -> Tensor:
        known = getattr(self, self.cache)
        if (height, width) not in known:
            known[height, width] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        patches = known[height, width] + 1
        return torch.cat((patches.new_zeros(special, 2), patches)).expand(count, -1, -1).clone()


class PatchEmbed(nn.Conv2d):
    def __init__(self, patch_size: int) -> None:
        super().__init__(3, WIDTH, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).flatten(2).transpose(1, 2)


class Encoder(PatchEmbed):
    """An encoder that returns its patch tokens among other things, as DINOv2 does."""

    def forward(self, images: Tensor, is_training: bool = False) -> Any:
        return {"x_norm_patchtokens": super().forward(images), "masks": None}


class HeadDecoder(nn.Module):
    """A transformer inside frames, from the tokens of two layers side by side."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.projects, self.blocks = nn.Linear(2 * WIDTH, WIDTH), Block(Pi3Attention(rope))

    def forward(self, hidden: Tensor, xpos: Tensor | None = None) -> Tensor:
        return self.blocks(self.projects(hidden), xpos=xpos)


class TokenPixels(nn.Module):
    """A head from a list of patch tokens [B, h * w, C] to maps [B, H, W, channels]."""

    def __init__(self, patch_size: int, channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(WIDTH, channels * patch_size**2)

    def forward(self, tokens: list[Tensor], size: tuple[int, int]) -> Tensor:
        grid = [side // self.patch_size for side in size]
        maps = self.proj(tokens[-1]).transpose(1, 2).unflatten(2, grid)
        return F.pixel_shuffle(maps, self.patch_size).permute(0, 2, 3, 1)


class CameraPoses(nn.Module):
    """A head from patch tokens [B, h * w, C] to poses [B, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.res_conv = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(2)
        )

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        for layer in self.res_conv:
            tokens = tokens + layer(tokens)
        turned = torch.linalg.qr(tokens.mean(1)[..., :9].unflatten(-1, (3, 3)).float())[0]
        poses = torch.eye(4, device=tokens.device).repeat(len(tokens), 1, 1)
        poses[..., :3, :3] = turned * torch.linalg.det(turned)[..., None, None]
        return poses


def homogenize_points(points: Tensor) -> Tensor:
    """Return points [..., 3] with a one behind them."""
    return torch.cat((points, torch.ones_like(points[..., :1])), dim=-1)


class PixelHead(nn.Module):
    """A head from patch tokens [B, S, h * w, C] to maps [B, S, H, W, channels]."""

    def __init__(self, patch_size: int, channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.project = nn.Linear(WIDTH, channels)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        batch, frames = tokens.shape[:2]
        grid = (height // self.patch_size, width // self.patch_size)
        maps = self.project(tokens).unflatten(2, grid).permute(0, 1, 4, 2, 3).flatten(0, 1)
        maps = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
        return maps.unflatten(0, (batch, frames)).permute(0, 1, 3, 4, 2)


class DualHead(PixelHead):
    """Depth-Anything-3's dense head: maps of depth, and rays by modules of their own."""

    def __init__(self, patch_size: int) -> None:
        super().__init__(patch_size, 2)
        self.scratch = nn.Module()
        for level in (4, 3, 2, 1):
            setattr(self.scratch, f"refinenet{level}_aux", _Fusion())
        for name in ("output_conv1_aux", "output_conv2_aux"):
            levels = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(4))
            setattr(self.scratch, name, levels)

    def forward(self, tokens: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        maps = super().forward(tokens, height, width)
        grid = (height // self.patch_size, width // self.patch_size)
        level = tokens.flatten(0, 1).transpose(1, 2).unflatten(2, grid)
        rays = self.scratch.refinenet4_aux(level, size=grid)
        for number in (3, 2, 1):
            rays = getattr(self.scratch, f"refinenet{number}_aux")(rays, level, size=grid)
        rays = self.scratch.output_conv2_aux[-1](self.scratch.output_conv1_aux[3](rays))
        return maps, rays


class _Fusion(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor, *lateral: Tensor, size: tuple[int, int]) -> Tensor:
        return super().forward(sum(lateral, x))


def pose_encoding(tokens: Tensor) -> Tensor:
    """Return a valid pose encoding made of a token per frame [B, S, C]."""
    turn = F.normalize(tokens[..., 3:7] + torch.tensor([0.0, 0.0, 0.0, 3.0]), dim=-1)
    return torch.cat((tokens[..., :3], turn, 1.0 + 0.1 * tokens[..., 7:9].tanh()), dim=-1)


def first_and_others(token: Tensor, batch: int, frames: int) -> Tensor:
    """Return special tokens [1, 2, X, C] as [B * S, X, C], with index 0 for frame 0 only."""
    others = token[:, 1:].expand(batch, frames - 1, -1, -1)
    first = token[:, :1].expand(batch, 1, -1, -1)
    return torch.cat((first, others), dim=1).flatten(0, 1)
