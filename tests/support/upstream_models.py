"""Small instances of the real upstream models, as far as they are installed.

Folders named in the environment variable SPARK3R_UPSTREAM (separated like PATH) are searched after
the normal import path. Nothing of these packages is part of this repository.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from copy import deepcopy
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("XFORMERS_DISABLED", "1")  # π³'s encoder would need a GPU with it
os.environ.setdefault("DA3_LOG_LEVEL", "WARN")
for _folder in os.environ.get("SPARK3R_UPSTREAM", "").split(os.pathsep):
    if _folder and _folder not in sys.path:
        sys.path.append(_folder)


def vggt() -> nn.Module:
    from vggt.heads.camera_head import CameraHead
    from vggt.heads.dpt_head import DPTHead
    from vggt.models.aggregator import Aggregator
    from vggt.models.vggt import VGGT

    model = _bare(VGGT)  # its own constructor makes the full size only
    model.aggregator = Aggregator(
        img_size=56, patch_size=14, embed_dim=64, depth=4, num_heads=4, patch_embed="conv"
    )
    model.camera_head = CameraHead(dim_in=128, trunk_depth=1, num_heads=4)
    dense = partial(
        DPTHead,
        dim_in=128,
        features=16,
        out_channels=[16] * 4,
        intermediate_layer_idx=[0, 1, 2, 3],
        conf_activation="expp1",
    )
    model.point_head = dense(output_dim=4, activation="inv_log")
    model.depth_head = dense(output_dim=2, activation="exp")
    model.track_head = None
    return model


def _pi3_trunk(model: Any, width: int = 64, blocks: int = 6) -> None:
    from pi3.models.dinov2.layers import MemEffAttention, Mlp, NestedTensorBlock
    from pi3.models.dinov2.models.vision_transformer import DinoVisionTransformer
    from pi3.models.layers.attention import FlashAttentionRope
    from pi3.models.layers.block import BlockRope
    from pi3.models.layers.camera_head import CameraHead
    from pi3.models.layers.pos_embed import PositionGetter, RoPE2D
    from pi3.models.layers.transformer_head import TransformerDecoder

    model.encoder = DinoVisionTransformer(
        img_size=56,
        patch_size=14,
        embed_dim=width,
        depth=1,
        num_heads=4,
        mlp_ratio=2,
        block_fn=partial(NestedTensorBlock, attn_class=MemEffAttention),
        num_register_tokens=4,
        init_values=1.0,
        block_chunks=0,
        interpolate_antialias=False,
        interpolate_offset=0.1,
    )
    del model.encoder.mask_token
    model.patch_size, model.patch_start_idx, model.dec_embed_dim = 14, 5, width
    model.rope, model.position_getter = RoPE2D(freq=100), PositionGetter()
    model.decoder = nn.ModuleList(
        BlockRope(
            dim=width,
            num_heads=4,
            mlp_ratio=2,
            qkv_bias=True,
            proj_bias=True,
            ffn_bias=True,
            ffn_layer=Mlp,
            init_values=0.01,
            qk_norm=True,
            attn_class=FlashAttentionRope,
            rope=model.rope,
        )
        for _ in range(blocks)
    )
    model.register_token = nn.Parameter(1e-6 * torch.randn(1, 1, 5, width))
    decoder = partial(
        TransformerDecoder,
        in_dim=2 * width,
        dec_embed_dim=width,
        dec_num_heads=4,
        depth=1,
        rope=model.rope,
    )
    model.point_decoder, model.conf_decoder = decoder(out_dim=64), decoder(out_dim=64)
    model.camera_decoder, model.camera_head = decoder(out_dim=64), CameraHead(dim=64)
    for name in ("image_mean", "image_std"):
        model.register_buffer(name, torch.full((1, 3, 1, 1), 0.5))


def pi3() -> nn.Module:
    from pi3.models.layers.transformer_head import LinearPts3d
    from pi3.models.pi3 import Pi3

    model = _bare(Pi3)
    _pi3_trunk(model)
    model.pos_type = "rope100"
    model.point_head = LinearPts3d(patch_size=14, dec_embed_dim=64, output_dim=3)
    model.conf_head = LinearPts3d(patch_size=14, dec_embed_dim=64, output_dim=1)
    return model


def pi3x(width: int = 64, blocks: int = 6) -> Any:
    from pi3.models.layers.conv_head import ConvHead
    from pi3.models.layers.transformer_head import ContextOnlyTransformerDecoder
    from pi3.models.pi3x import Pi3X

    model = _bare(Pi3X)
    _pi3_trunk(model, width, blocks)
    model.use_multimodal = False
    dense = partial(
        ConvHead,
        num_features=4,
        dim_in=64,
        projects=nn.Identity(),
        dim_proj=64,
        dim_upsample=[32, 32, 32],
        dim_times_res_block_hidden=1,
        num_res_blocks=1,
        res_block_norm="group_norm",
        last_res_blocks=0,
        last_conv_channels=16,
        last_conv_size=1,
        using_uv=True,
    )
    model.point_head, model.conf_head = dense(dim_out=[2, 1]), dense(dim_out=[1])
    model.metric_token = nn.Parameter(1e-6 * torch.randn(1, 1, 2 * width))
    model.metric_decoder = ContextOnlyTransformerDecoder(
        in_dim=2 * width, dec_embed_dim=32, dec_num_heads=2, out_dim=32, rope=model.rope
    )
    model.metric_head = nn.Linear(32, 1)
    return model


def pi3x_with_poses() -> nn.Module:
    """Return Pi3X with its pose injection, for which upstream fixes the width at 1024."""
    from pi3.models.dinov2.layers import PatchEmbed
    from pi3.models.layers.block import PoseInjectBlock

    width = 1024
    model = pi3x(width, blocks=4)
    model.use_multimodal = True
    embed = partial(PatchEmbed, img_size=56, patch_size=14, in_chans=2, embed_dim=width)
    model.depth_encoder, model.ray_embed = deepcopy(model.encoder), embed()
    model.depth_encoder.patch_embed = embed()
    model.depth_emb = nn.Parameter(torch.zeros(1, 1, width))
    model.pose_inject_blk = nn.ModuleList(
        PoseInjectBlock(dim=width, num_heads=width // 16, qk_norm=True, init_values=0.01)
        for _ in range(1)
    )
    return model


def _da3_backbone(alt_start: int, cat_token: bool) -> nn.Module:
    from depth_anything_3.model.dinov2.dinov2 import DinoV2
    from depth_anything_3.model.dinov2.vision_transformer import DinoVisionTransformer

    backbone = _bare(DinoV2)
    backbone.out_layers = [1, 3, 5, 7]
    backbone.pretrained = DinoVisionTransformer(
        img_size=56,
        patch_size=14,
        embed_dim=64,
        depth=8,
        num_heads=4,
        mlp_ratio=2,
        ffn_layer="mlp",
        cat_token=cat_token,
        **dict.fromkeys(("alt_start", "qknorm_start", "rope_start"), alt_start),
    )
    return backbone


def da3_tiny() -> nn.Module:
    from depth_anything_3.model.cam_dec import CameraDec
    from depth_anything_3.model.cam_enc import CameraEnc
    from depth_anything_3.model.da3 import DepthAnything3Net
    from depth_anything_3.model.dualdpt import DualDPT

    return DepthAnything3Net(
        net=_da3_backbone(alt_start=2, cat_token=True),
        head=DualDPT(dim_in=128, output_dim=2, features=16, out_channels=[16] * 4),
        cam_dec=CameraDec(dim_in=128),
        cam_enc=CameraEnc(dim_out=64, trunk_depth=1, num_heads=4),
    )


def da3_nested() -> nn.Module:
    """Return the nested network: an any-view branch, and a metric one without global layers."""
    from depth_anything_3.model.da3 import DepthAnything3Net, NestedDepthAnything3Net
    from depth_anything_3.model.dpt import DPT

    model = _bare(NestedDepthAnything3Net)
    model.da3 = da3_tiny()
    head = DPT(dim_in=64, output_dim=1, features=16, out_channels=[16] * 4)
    nn.init.constant_(head.scratch.sky_output_conv2[-1].bias, -5.0)  # otherwise every pixel is sky
    model.da3_metric = DepthAnything3Net(
        net=_da3_backbone(alt_start=-1, cat_token=False), head=head
    )
    return model


def da3_small() -> nn.Module:
    """Return the real da3-small architecture: 34 million random weights."""
    from depth_anything_3.cfg import create_object, load_config
    from depth_anything_3.registry import MODEL_REGISTRY

    return create_object(load_config(MODEL_REGISTRY["da3-small"]))


def omega() -> nn.Module:
    from vggt_omega.models.aggregator import Aggregator
    from vggt_omega.models.heads import CameraHead, DenseHead
    from vggt_omega.models.vggt_omega import VGGTOmega

    model = _bare(VGGTOmega)
    model.aggregator = Aggregator(
        patch_size=16,
        embed_dim=64,
        depth=6,
        num_heads=4,
        num_register_tokens=16,
        register_attention_block_indices=[1],
        cached_layer_indices=(2, 3, 4, 5),
    )
    model.camera_head = CameraHead(dim_in=128)
    model.dense_head = DenseHead(
        dim_in=128,
        patch_size=16,
        features=16,
        out_channels=[16] * 4,
        intermediate_layer_idx=[2, 3, 4, 5],
    )
    model.text_alignment_head = None
    return model


def mapanything(**transformer: Any) -> nn.Module:
    """Return a small MapAnything, which takes the clip ``[B, S, 3, H, W]`` of all tests, too.

    Args:
        transformer: Arguments of its transformer that differ from those of version 1.1.
    """
    from mapanything.models.external.dinov2.hub import backbones
    from mapanything.models.mapanything import MapAnything
    from stand_in_mapanything import views_of

    from spark3r.loading import mapanything as loading

    class Small(MapAnything):
        def forward(
            self, views: Any, memory_efficient_inference: bool = False, minibatch_size: Any = None
        ) -> Any:
            return super().forward(views_of(views), memory_efficient_inference, minibatch_size)

    Small.__qualname__ = "Small"
    globals()["Small"] = Small  # where pickle looks for it
    made = loading.configuration("v1.1")
    made["encoder_config"].update(size="small", keep_first_n_layers=1)
    made["info_sharing_config"]["module_args"].update(depth=6, dim=64, num_heads=4, indices=[1, 3])
    made["info_sharing_config"]["module_args"].update(transformer)
    made["pred_head_config"]["feature_head"]["feature_dim"] = 16
    with loading.dinov2_of(backbones), contextlib.redirect_stdout(io.StringIO()):
        model = Small(**made)
    for part in model.dpt_regressor_head.modules():
        if isinstance(part, nn.Conv2d) and part.out_channels == 6:
            nn.init.constant_(part.bias[2], 5.0)  # rays point forward
    return model


@cache
def _small_worldmirror() -> Any:
    """Return the class of the model."""
    from stand_in_worldmirror import views_of

    from spark3r.loading import worldmirror as loading

    with loading.without_kernels():
        from hyworld2.worldrecon.hyworldmirror.models.models.worldmirror import WorldMirror

    class SmallMirror(WorldMirror):
        def forward(self, views: Any, *args: Any, **kwargs: Any) -> Any:
            return super().forward(views_of(views), *args, **kwargs)

    SmallMirror.__qualname__ = "SmallMirror"
    globals()["SmallMirror"] = SmallMirror  # where pickle looks for it
    return SmallMirror


def worldmirror(normalised: bool = True) -> nn.Module:
    """Return a small WorldMirror, which takes the clip ``[B, S, 3, H, W]`` of all tests, too.

    Args:
        normalised: False for version 1, by the code of version 2.
    """
    model = _bare(_small_worldmirror())
    from hyworld2.worldrecon.hyworldmirror.models.heads.camera_head import CameraHead
    from hyworld2.worldrecon.hyworldmirror.models.heads.dense_head import DPTHead
    from hyworld2.worldrecon.hyworldmirror.models.models.visual_transformer import (
        VisualGeometryTransformer,
    )

    with contextlib.redirect_stdout(io.StringIO()):
        model.visual_geometry_transformer = VisualGeometryTransformer(
            img_size=56,
            patch_size=14,
            embed_dim=64,
            depth=4,
            num_heads=4,
            patch_embed="conv",
            intermediate_idxs=[0, 1, 2, 3],
            enable_cond=True,
            normalized_rope=normalised,
        )
    model.enable_cam = model.enable_depth = model.enable_norm = True
    model.enable_pts = model.enable_gs = model.enable_bf16 = False
    model.enable_depth_mask = normalised
    model.cam_head = CameraHead(dim_in=128, trunk_depth=1, num_heads=4)
    with torch.no_grad():  # angles of view stay above 0
        model.cam_head.param_predictor.fc2.weight[7:] *= 0.1
        model.cam_head.param_predictor.fc2.bias[7:] = 0.25
    dense = partial(DPTHead, dim_in=128, features=16, out_channels=[16] * 4, patch_size=14)
    model.norm_head = dense(output_dim=4, activation="norm+expp1")
    model.depth_head = dense(
        output_dim=3 if normalised else 2,
        activation="exp+expp1+linear" if normalised else "exp+expp1",
        enable_depth_mask=normalised,
    )
    return model


def panovggt() -> nn.Module:
    from panovggt.layers.camera_head import CameraHead
    from panovggt.layers.transformer_head import (
        ContextTransformerDecoder,
        LinearPts3d,
        TransformerDecoder,
    )
    from panovggt.models.aggregator import Aggregator
    from panovggt.models.panovggt_model import PanoVGGTModel, PositionAdapter

    model = _bare(PanoVGGTModel)
    model.patch_size, model.Cpos = 14, 64
    model.enable_camera = model.enable_point = model.enable_depth = True
    model.enable_global_points = True
    model.aggregator = Aggregator(
        img_size=56,
        embed_dim=64,
        depth=6,
        num_heads=4,
        patch_embed="conv",
        pos_mlp_hidden=32,
    )
    common = {"in_dim": 128, "dec_num_heads": 4, "depth": 1, "rope": model.aggregator.rope}
    common |= {"dec_embed_dim": 64, "out_dim": 64}
    model.point_decoder, model.camera_decoder = (TransformerDecoder(**common) for _ in range(2))
    model.global_points_decoder = ContextTransformerDecoder(**common)
    for name in ("point_head", "global_point_head"):
        setattr(model, name, LinearPts3d(patch_size=14, dec_embed_dim=64, output_dim=3))
    model.camera_head = CameraHead(dim=64)
    model.pos_adapters = nn.ModuleDict(
        {name: PositionAdapter(64, 64) for name in ("point", "camera", "global")}
    )
    for name in ("_direction_vectors_cache", "_cache_hw"):
        model.register_buffer(name, None, persistent=False)
    return model


def flat(output: Any) -> dict[str, Tensor]:
    """Return the tensors among a model's outputs; those of several views side by side."""
    if isinstance(output, list):
        return {
            name: torch.stack([view[name] for view in output], dim=1)
            for name, value in output[0].items()
            if value.is_floating_point()
        }
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def _bare(kind: type[Any]) -> Any:
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    return model
