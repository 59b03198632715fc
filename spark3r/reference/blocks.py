"""The transformer block of frame and global attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..rope import Rope, apply_rope

# VGGT has 0.01. In a model that trains for hours, the blocks must have an effect earlier.
LAYER_SCALE = 0.2


class Attention(nn.Module):
    """Self-attention with normalised, rotated queries and keys.

    Args:
        width: Channels of a token, C.
        num_heads: Number of heads H, a divisor of `width`.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(self.head_dim)
        self.k_norm = nn.LayerNorm(self.head_dim)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """Return attention over all tokens of each sequence.

        Args:
            x: Tokens `[B, N, C]`.
            rope: Cosines and sines `[N, D]`.

        Returns:
            `[B, N, C]`.
        """
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D] each
        q = apply_rope(self.q_norm(q).to(v.dtype), rope)
        k = apply_rope(self.k_norm(k).to(v.dtype), rope)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))


class LayerScale(nn.Module):
    """A learned gain per channel.

    Args:
        width: Number of channels, C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(LAYER_SCALE * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., C]` scaled channel by channel."""
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers with a GELU in between.

    Args:
        width: Number of channels, C.
        ratio: Hidden channels ÷ channels, 4 by default.
    """

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output `[..., C]` for an input `[..., C]`."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and before a LayerScale.

    Args:
        width: Channels of a token, C.
        num_heads: Number of attention heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """Return the updated residual stream.

        Args:
            x: Tokens `[B, N, C]`.
            rope: Cosines and sines `[N, D]`.

        Returns:
            `[B, N, C]`, dtype of `x`.
        """
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))
