"""Small models with the attribute names and call conventions of the upstream ones.

Written for these tests: they have the structure that the families rely on, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from stand_in_parts import (
    WIDTH,
    Attention,
    Block,
    CameraPoses,
    Da3Attention,
    DualHead,
    Encoder,
    HeadDecoder,
    MaskedBiasLinear,
    OmegaAttention,
    PatchEmbed,
    Pi3Attention,
    PixelHead,
    PositionGetter,
    Rotary,
    TokenPixels,
    VggtAttention,
    first_and_others,
    homogenize_points,
    pose_encoding,
)
from torch import Tensor, nn


class VggtAggregator(nn.Module):
    def __init__(self, attention: type[Attention] = VggtAttention, pairs: int = 3) -> None:
        super().__init__()
        self.patch_size, self.patch_start_idx = 14, 3
        self.rope, self.position_getter = Rotary("base_frequency"), PositionGetter("position_cache")
        self.patch_embed = PatchEmbed(14)
        self.camera_token = nn.Parameter(1e-6 * torch.randn(1, 2, 1, WIDTH))
        self.register_token = nn.Parameter(1e-6 * torch.randn(1, 2, 2, WIDTH))
        self.frame_blocks = nn.ModuleList(Block(attention(self.rope)) for _ in range(pairs))
        self.global_blocks = nn.ModuleList(Block(attention(self.rope)) for _ in range(pairs))

    def forward(self, images: Tensor) -> tuple[list[Tensor], int]:
        batch, frames, _, height, width = images.shape
        x = self.patch_embed(images.flatten(0, 1))
        special = (self.camera_token, self.register_token)
        x = torch.cat([*(first_and_others(t, batch, frames) for t in special), x], dim=1)
        pos = self.position_getter(batch * frames, height // 14, width // 14, 3)
        outputs, shape = [], (batch, frames, x.shape[1], WIDTH)
        for i in range(len(self.global_blocks)):
            x, _, local = self._process_frame_attention(x, *shape, i, pos=pos)
            x, _, whole = self._process_global_attention(x, *shape, i, pos=pos)
            outputs.append(torch.cat((local[0], whole[0]), dim=-1))
        return outputs, self.patch_start_idx

    def _process_frame_attention(
        self, x: Tensor, b: int, s: int, p: int, c: int, i: int, pos: Tensor
    ) -> tuple[Tensor, int, list[Tensor]]:
        x = self.frame_blocks[i](x.reshape(b * s, p, c), pos=pos)
        return x, i + 1, [x.reshape(b, s, p, c)]

    def _process_global_attention(
        self, x: Tensor, b: int, s: int, p: int, c: int, i: int, pos: Tensor
    ) -> tuple[Tensor, int, list[Tensor]]:
        x = self.global_blocks[i](x.reshape(b, s * p, c), pos=pos.reshape(b, s * p, 2))
        return x, i + 1, [x.reshape(b, s, p, c)]


class Vggt(nn.Module):
    def __init__(self, attention: type[Attention] = VggtAttention) -> None:
        super().__init__()
        self.aggregator = VggtAggregator(attention)
        self.depth_head = PixelHead(14, 2)
        self.depth_head.intermediate_layer_idx = [0, 2]
        self.point_head = PixelHead(14, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = images if images.ndim == 5 else images[None]
        tokens, start = self.aggregator(images)
        patches = sum(tokens[i] for i in self.depth_head.intermediate_layer_idx)[:, :, start:]
        maps = self.depth_head(patches[..., WIDTH:], *images.shape[-2:])
        predictions = {
            "pose_enc": pose_encoding(tokens[-1][:, :, 0, WIDTH:]),
            "depth": maps[..., :1].exp(),
            "depth_conf": 1 + maps[..., 1].exp(),
        }
        if self.point_head is not None:
            points = self.point_head(patches[..., WIDTH:], *images.shape[-2:])
            predictions["world_points"] = points[..., :3]
        return predictions


class Pi3(nn.Module):
    """π³, of which every head has a decoder of its own and then layers in float32."""

    def __init__(self, attention: type[Attention] = Pi3Attention, blocks: int = 6) -> None:
        super().__init__()
        self.patch_size, self.patch_start_idx = 14, 2
        self.rope, self.position_getter = Rotary("base"), PositionGetter("cache_positions")
        self.encoder = Encoder(14)
        self.register_token = nn.Parameter(1e-6 * torch.randn(1, 1, 2, WIDTH))
        self.decoder = nn.ModuleList(Block(attention(self.rope)) for _ in range(blocks))
        for name in ("point_decoder", "conf_decoder", "camera_decoder"):
            setattr(self, name, HeadDecoder(self.rope))
        self.point_head, self.conf_head = TokenPixels(14, 3), TokenPixels(14, 1)
        self.camera_head = CameraPoses()
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.full((3, 1, 1), 0.5))

    def decode(self, hidden: Tensor, N: int, H: int, W: int) -> tuple[Tensor, Tensor]:
        batch = hidden.shape[0] // N
        register = self.register_token[0].expand(batch * N, -1, -1)
        hidden = torch.cat((register, hidden), dim=1)
        pos = self.position_getter(batch * N, H // 14, W // 14, 2)
        last: list[Tensor] = []
        for i, block in enumerate(self.decoder):
            count = batch if i % 2 else batch * N
            hidden = block(hidden.reshape(count, -1, WIDTH), xpos=pos.reshape(count, -1, 2))
            hidden = self.inject(i, hidden)
            last = [*last[-1:], hidden.reshape(batch * N, -1, WIDTH)]
        return torch.cat(last, dim=-1), pos

    def inject(self, i: int, hidden: Tensor) -> Tensor:
        return hidden

    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        batch, frames, *_, height, width = imgs.shape
        first, size = self.patch_start_idx, (height, width)
        imgs = (imgs - self.image_mean) / self.image_std
        patches = self.encoder(imgs.reshape(batch * frames, 3, *size), is_training=True)
        if isinstance(patches, dict):
            patches = patches["x_norm_patchtokens"]
        hidden, pos = self.decode(patches, frames, *size)
        read = (self.point_decoder, self.conf_decoder, self.camera_decoder)
        point, conf, camera = [decoder(hidden, xpos=pos) for decoder in read]
        with torch.amp.autocast(device_type="cuda", enabled=False):
            xy, z = self.point_head([point.float()[:, first:]], size).split([2, 1], dim=-1)
            local = torch.cat((xy * z.exp(), z.exp()), dim=-1)
            logits = self.conf_head([conf.float()[:, first:]], size)
            poses = self.camera_head(camera.float()[:, first:], height // 14, width // 14)
            points = torch.einsum("fij,fhwj->fhwi", poses, homogenize_points(local))[..., :3]
        shape = (batch, frames, *size, -1)
        return {
            "points": points.reshape(shape),
            "local_points": local.reshape(shape),
            "conf": logits.reshape(shape),
            "camera_poses": poses.reshape(batch, frames, 4, 4),
        }


class Pi3X(Pi3):
    """π³ with Pi3X's own cross-frame attention, which a schedule must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.pose_inject_blk = nn.ModuleList(Block(Pi3Attention(self.rope)) for _ in range(2))
        self.metric_decoder = Block(Pi3Attention())
        self.poses: Tensor | None = None

    def inject(self, i: int, hidden: Tensor) -> Tensor:
        if self.poses is None or i != 1:
            return hidden
        token = self.poses.flatten(2)[..., :1].repeat_interleave(
            hidden.shape[1] // self.poses.shape[1], dim=1
        )
        for inject in self.pose_inject_blk:
            hidden = hidden + token * inject(hidden)
        return hidden

    def forward(self, imgs: Tensor, poses: Tensor | None = None) -> dict[str, Tensor]:
        self.poses = poses
        output = super().forward(imgs)
        tokens = output["local_points"].flatten(1, 3)[:, :60].repeat(1, 1, WIDTH)[..., :WIDTH]
        output["metric"] = self.metric_decoder(tokens).mean((1, 2)).exp()
        return output


class DinoVisionTransformer(nn.Module):
    def __init__(self, alt_start: int = 2, blocks: int = 8) -> None:
        super().__init__()
        self.alt_start, self.patch_size, self.num_register_tokens = alt_start, 14, 0
        self.rope, self.position_getter = Rotary("base_frequency"), PositionGetter("position_cache")
        self.patch_embed = PatchEmbed(14)
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, WIDTH))
        self.camera_token = nn.Parameter(1e-6 * torch.randn(1, 2, WIDTH))
        self.blocks = nn.ModuleList(
            Block(Da3Attention(self.rope if i >= alt_start else None)) for i in range(blocks)
        )

    def get_intermediate_layers(
        self, x: Tensor, cam_token: Tensor | None = None, ref_view_strategy: str = "middle"
    ) -> Tensor:
        batch, frames, _, height, width = x.shape
        pos = self.position_getter(batch * frames, height // 14, width // 14, 1)
        x = self.patch_embed(x.flatten(0, 1))
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        order = torch.arange(frames)
        for i, block in enumerate(self.blocks):
            if i == self.alt_start:
                x = x.reshape(batch, frames, -1, WIDTH)
                if cam_token is None and frames >= 3 and ref_view_strategy == "middle":
                    rest = [f for f in range(frames) if f != frames // 2]
                    order = torch.tensor([frames // 2, *rest])
                    x = x[:, order]
                if cam_token is None:
                    cam_token = first_and_others(self.camera_token[:, :, None], batch, frames)
                    cam_token = cam_token.reshape(batch, frames, WIDTH)
                x = torch.cat((cam_token[:, :, None], x[:, :, 1:]), dim=2)
            if i >= self.alt_start > -1 and i % 2:
                same = pos.clamp(max=1).reshape(batch, -1, 2)
                x = block(x.reshape(batch, -1, WIDTH), pos=same, attn_mask=None)
            else:
                x = block(x.reshape(batch * frames, -1, WIDTH), pos=pos, attn_mask=None)
        return x.reshape(batch, frames, -1, WIDTH)[:, order.argsort()]


class DinoV2(nn.Module):
    def __init__(self, alt_start: int = 2) -> None:
        super().__init__()
        self.pretrained = DinoVisionTransformer(alt_start)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.pretrained.get_intermediate_layers(x, **kwargs)


class Da3(nn.Module):
    def __init__(self, alt_start: int = 2) -> None:
        super().__init__()
        self.backbone, self.head = DinoV2(alt_start), DualHead(14)
        self.cam_enc = nn.Linear(16, WIDTH)
        self.cam_dec = nn.Linear(WIDTH, 3)

    def forward(
        self, x: Tensor, extrinsics: Tensor | None = None, ref_view_strategy: str = "middle"
    ) -> dict[str, Tensor]:
        height, width = x.shape[-2:]
        cam_token = None if extrinsics is None else self.cam_enc(extrinsics.flatten(2))
        tokens = self.backbone(x, cam_token=cam_token, ref_view_strategy=ref_view_strategy)
        maps, _ = self.head(tokens[:, :, 1:], height, width)  # the rays are dropped
        focal = 40.0 + 0 * tokens[:, :, 0, 0]
        zero, one = torch.zeros_like(focal), torch.ones_like(focal)
        rows = (focal, zero, one * width / 2, zero, focal, one * height / 2, zero, zero, one)
        where = torch.cat(
            (torch.eye(3).expand(*focal.shape, 3, 3), self.cam_dec(tokens[:, :, 0])[..., None]), -1
        )
        return {
            "depth": maps[..., 0].exp(),
            "depth_conf": 1 + maps[..., 1].exp(),
            "extrinsics": where,
            "intrinsics": torch.stack(rows, dim=-1).unflatten(-1, (3, 3)),
        }


class Da3Api(nn.Module):
    """The API object that users hold: its inference() calls forward as a method."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Da3()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.model(image)

    def inference(self, image: Tensor) -> dict[str, Tensor]:
        return self.forward(image)


class OmegaAggregator(nn.Module):
    def __init__(self, attention: type[Attention] = OmegaAttention) -> None:
        super().__init__()
        self.patch_size, self.patch_token_start = 16, 3
        self.patch_embed = PatchEmbed(16)
        self.camera_token = nn.Parameter(1e-3 * torch.randn(1, 2, 1, WIDTH))
        self.register_token = nn.Parameter(1e-3 * torch.randn(1, 2, 2, WIDTH))
        kinds = ["global", "register", "global", "global"]
        make = [Block(attention(linear=MaskedBiasLinear)) for _ in range(2 * len(kinds))]
        self.inter_frame_attention_types = kinds
        self.frame_blocks = nn.ModuleList(make[: len(kinds)])
        self.inter_frame_blocks = nn.ModuleList(make[len(kinds) :])

    def forward(self, images: Tensor) -> tuple[list[Tensor], int]:
        batch, frames = images.shape[:2]
        x = self.patch_embed(images.flatten(0, 1))
        special = (self.camera_token, self.register_token)
        x = torch.cat([*(first_and_others(t, batch, frames) for t in special), x], dim=1)
        blocks = zip(self.frame_blocks, self.inter_frame_blocks, strict=True)
        for (local, whole), kind in zip(blocks, self.inter_frame_attention_types, strict=True):
            x = local(x.reshape(batch * frames, -1, WIDTH), rope=None)
            x = x.reshape(batch, frames, -1, WIDTH)
            part = x if kind == "global" else x[:, :, : self.patch_token_start]
            shape = part.shape
            part = whole(part.reshape(batch, -1, WIDTH), rope=None).reshape(shape)
            x = part if kind == "global" else torch.cat((part, x[:, :, shape[2] :]), dim=2)
        return [x], self.patch_token_start


class Omega(nn.Module):
    def __init__(self, attention: type[Attention] = OmegaAttention) -> None:
        super().__init__()
        self.aggregator = OmegaAggregator(attention)
        self.dense_head = PixelHead(16, 2)
        self.text_alignment_head = nn.Linear(WIDTH, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = images if images.ndim == 5 else images[None]
        tokens, start = self.aggregator(images)
        maps = self.dense_head(tokens[-1][:, :, start:], *images.shape[-2:])
        aligned = {}
        if self.text_alignment_head is not None:
            aligned["text_embedding"] = self.text_alignment_head(tokens[-1][:, :, 0])
        return {
            **aligned,
            "pose_enc": pose_encoding(tokens[-1][:, :, 0]),
            "depth": maps[..., :1].exp(),
            "depth_conf": 1 + maps[..., 1].exp(),
        }
