"""Two-dimensional rotary position embedding, shared by every block of one pass."""

from __future__ import annotations

import torch
from torch import Tensor

BASE_FREQUENCY = 100.0

Rope = tuple[Tensor, Tensor]


def make_rope(
    height: int, width: int, special_tokens: int, head_dim: int, device: torch.device
) -> Rope:
    """Return the rotation tables of one frame's tokens.

    Special tokens have position (0, 0), the patch in row y and column x has (y + 1, x + 1). The
    first half of a head is rotated by y, the second by x.

    Args:
        height: Rows of the patch grid.
        width: Columns of the patch grid.
        special_tokens: Number of tokens before the patches.
        head_dim: Size of one attention head, D, a multiple of 4.
        device: Device of the tables.

    Returns:
        Cosines and sines, fp32 `[P, D]` each, P = special_tokens + height * width.

    Raises:
        ValueError: If `head_dim` is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4, got {head_dim}")
    quarter = head_dim // 4
    exponent = torch.arange(quarter, device=device, dtype=torch.float32) / quarter
    frequency = BASE_FREQUENCY**-exponent  # [D/4]
    rows = torch.arange(1, height + 1, device=device, dtype=torch.float32)
    columns = torch.arange(1, width + 1, device=device, dtype=torch.float32)
    y = rows[:, None].expand(height, width).reshape(-1)
    x = columns[None, :].expand(height, width).reshape(-1)
    position = torch.cat([y.new_zeros(special_tokens, 2), torch.stack([y, x], dim=1)])  # [P, 2]
    angle = position[:, :, None] * frequency  # [P, 2, D/4]
    angle = torch.cat([angle, angle], dim=2).flatten(1)  # [P, D]: y y | x x
    return angle.cos(), angle.sin()


def apply_rope(tokens: Tensor, rope: Rope) -> Tensor:
    """Return rotated queries or keys.

    Args:
        tokens: `[B, H, N, D]`, floating point.
        rope: Cosines and sines, `[N, D]` each.

    Returns:
        The rotated tokens, same shape and dtype as `tokens`.
    """
    cos, sin = rope[0].to(tokens.dtype), rope[1].to(tokens.dtype)
    first_y, second_y, first_x, second_x = tokens.chunk(4, dim=-1)
    rotated = torch.cat([-second_y, first_y, -second_x, first_x], dim=-1)
    # In place, because on long clips every copy takes gigabytes, and contiguous like upstream's
    # result, because attention rounds differently on other strides.
    return rotated.mul_(sin).add_(tokens * cos)
