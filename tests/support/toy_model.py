"""A model that no family knows."""

from __future__ import annotations

from torch import Tensor, nn


class ToyModel(nn.Module):
    """One layer of global attention over patches of 8 pixels, of no known family."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * 64, 8)
        self.attn = ToyAttention()
        self.head = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        patches = nn.functional.unfold(images.flatten(0, 1), 8, stride=8).transpose(1, 2)
        tokens = self.embed(patches).reshape(images.shape[0], -1, 8)
        output: Tensor = self.head(tokens + self.attn(tokens))
        return output


class ToyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        attended: Tensor = nn.functional.scaled_dot_product_attention(q, k, v)
        return attended.transpose(1, 2).flatten(2)
