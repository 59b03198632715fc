"""A small model with MapAnything's attribute names and call conventions.

Written for these tests. Upstream takes a list of views. The stand-in takes the clip that all
families' tests give, ``[B, S, 3, H, W]``, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from stand_in_parts import WIDTH, Attention, Block, PatchEmbed, PixelHead
from torch import Tensor, nn


def views_of(clip: Any) -> list[dict[str, Any]]:
    """Return a clip ``[B, S, 3, H, W]`` as one view for each frame; views stay as they are."""
    if not isinstance(clip, Tensor):
        return list(clip)
    return [{"img": each, "data_norm_type": ["dinov2"]} for each in clip.unbind(1)]


class MapAnythingAttention(Attention):
    """Attention whose queries may be scaled by the length of the sequence."""

    use_scalable_softmax = False
    use_entropy_scaling = False
    base_token_count_for_entropy_scaling = 444
    entropy_scaling_growth_factor = 1.4

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.custom_positional_encoding = None
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, xpos: Any = None) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        if self.use_scalable_softmax:
            query = query * math.log(x.shape[1])
        if self.use_entropy_scaling:
            growth = self.entropy_scaling_growth_factor * math.log(x.shape[1])
            base = math.log(self.base_token_count_for_entropy_scaling)
            query = query * math.sqrt(growth / base)
        output = F.scaled_dot_product_attention(query, key, value)
        output = self.proj(output.transpose(1, 2).flatten(2))
        return self.proj_drop(output) if hasattr(self, "proj_drop") else output


class PositionalBlock(Block):
    """A block that gives the positions on by their place, as a list of None."""

    def forward(self, x: Tensor, xpos: Any = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), xpos))
        return x + self.ls2(self.mlp(self.norm2(x)))


@dataclass
class TransformerInput:
    features: list[Tensor]
    additional_input_tokens_per_view: list[Tensor] | None
    additional_input_tokens: Tensor | None


class AlternatingTransformer(nn.Module):
    def __init__(self, attention: type[Attention], blocks: int) -> None:
        super().__init__()
        self.input_embed_dim, self.distinguish_ref_and_non_ref_views = WIDTH, True
        self.register_buffer("view_pos_table", torch.linspace(-1, 1, WIDTH)[None])
        self.self_attention_blocks = nn.ModuleList(
            PositionalBlock(attention()) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, model_input: TransformerInput) -> tuple[Tensor, Tensor]:
        own, views = model_input.additional_input_tokens_per_view, len(model_input.features)
        x = torch.stack([each.flatten(2) for each in model_input.features], dim=1)
        if own is not None:
            x = torch.cat((x, torch.stack(list(own), dim=1)), dim=3)
        x = x.transpose(2, 3)
        batch, _, tokens, _ = x.shape
        x = torch.cat((x[:, :1] + self.view_pos_table, x[:, 1:]), dim=1).flatten(1, 2)
        x = torch.cat((x, model_input.additional_input_tokens.transpose(1, 2)), dim=1)
        for i, block in enumerate(self.self_attention_blocks):
            if i % 2 == 0:
                x = block(x, [None] * views)
                continue
            inside, tail = x[:, : views * tokens], x[:, views * tokens :]
            inside = block(inside.reshape(batch * views, tokens, WIDTH), [None] * views)
            x = torch.cat((inside.reshape(batch, views * tokens, WIDTH), tail), dim=1)
        x = self.norm(x)
        return x[:, : views * tokens].unflatten(1, (views, tokens)), x[:, views * tokens :]


class DinoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_size, self.data_norm_type = 14, "dinov2"
        self.model = nn.Module()
        self.model.patch_embed, self.model.num_register_tokens = PatchEmbed(14), 0
        self.model.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        grid = [side // 14 for side in images.shape[-2:]]
        features = self.model.patch_embed(images).transpose(1, 2)
        token = self.model.cls_token.transpose(1, 2) + features.mean(2, keepdim=True)
        return features.unflatten(2, grid), token


class MapAnything(nn.Module):
    def __init__(
        self,
        attention: type[Attention] = MapAnythingAttention,
        class_token: bool = True,
        blocks: int = 6,
    ) -> None:
        super().__init__()
        self.use_register_tokens_from_encoder = class_token
        self.encoder = DinoEncoder()
        self.scale_token = nn.Parameter(0.02 * torch.randn(WIDTH))
        self.info_sharing = AlternatingTransformer(attention, blocks)
        self.dense_head = PixelHead(14, 5)
        self.pose_head, self.scale_head = nn.Linear(WIDTH, 7), nn.Linear(WIDTH, 1)

    def forward(self, views: Any) -> list[dict[str, Tensor]]:
        views = views_of(views)
        encoded = [self.encoder(view["img"]) for view in views]
        own = [token for _, token in encoded] if self.use_register_tokens_from_encoder else None
        scale = self.scale_token[None, :, None].repeat(len(views[0]["img"]), 1, 1)
        given = TransformerInput([features for features, _ in encoded], own, scale)
        tokens, tail = self.info_sharing(given)
        height, width = views[0]["img"].shape[-2:]
        metric = self.scale_head(tail[:, 0]).exp()
        patches = tokens[:, :, : (height // 14) * (width // 14)]
        maps = self.dense_head(patches, height, width)
        pose = self.pose_head(patches.mean(2)) + torch.tensor([0.0] * 6 + [3.0])
        rays = F.normalize(
            torch.cat((maps[..., :2], torch.ones_like(maps[..., :1])), dim=-1), dim=-1
        )
        along = maps[..., 3:4].exp() * metric[:, None, None, None]
        found = {
            "pts3d_cam": rays * along,
            "ray_directions": rays,
            "depth_along_ray": along,
            "cam_trans": pose[..., :3] * metric[:, None],
            "cam_quats": F.normalize(pose[..., 3:], dim=-1),
            "metric_scaling_factor": metric[:, None].expand(-1, len(views), -1),
            "conf": 1 + maps[..., 4].exp(),
        }
        return [{name: value[:, i] for name, value in found.items()} for i in range(len(views))]

    def infer(self, views: Any) -> list[dict[str, Tensor]]:
        """Return what upstream's method does for images alone: it calls forward as a method."""
        with torch.no_grad():
            return self.forward(views)
