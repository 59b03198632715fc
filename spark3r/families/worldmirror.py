"""WorldMirror 1 and 2: pairs of frame and global attention like VGGT's, heads on top of four pairs.

A frame has a camera token and registers, of its own in frame 0, then a token for a known pose and
one for a known focal length (zeros if they are not known), and the patches. Version 2 rotates by
positions that are normalised to the image, and calls the kernels of flash-attn itself; a reduced
layer calls torch's. The entry is ``visual_geometry_transformer``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import invert_pose
from ..layout import TokenLayout
from ..prediction import Prediction
from ..reduction.exchange import Exchange
from ..reduction.rule import ResolvedRule
from .base import Family, Replacement, overridden
from .parts.memory import aggregator_in_pieces
from .parts.outputs import first_clip
from .parts.preprocessing import crop_width
from .parts.query_key import Where, normalise_and_rotate, rows_in_frame
from .parts.recognition import (
    arguments,
    attentions,
    clip_images,
    fused_attentions,
    has,
    is_fused_attention,
    locate,
    located,
    names_used,
    refuse_dropout,
    refuse_stale_positions,
    unlike,
)
from .parts.reduced import reduced_attention
from .parts.rotary import without_waiting
from .parts.sharded import on_whole_clip, refuse_unlike, refused, special_of_last

_TRANSFORMERS = ("visual_geometry_transformer", "")
_ARGUMENTS = ("x", "pos")
_CAMERA_BEGINS = (
    *("token_norm", "shape", "range", "param_embed", "init_token", "expand"),
    "detach",
)
_CAMERA_ENDS = (
    *("adapt_norm_gen", "chunk", "apply_adaptive_modulation", "adapt_norm", "refine_net"),
    *("param_predictor", "out_norm", "apply_camera_parameter_activation", "append"),
)
_CAMERA_USES = (
    (*_CAMERA_BEGINS, "to", "dtype", *_CAMERA_ENDS),
    (*_CAMERA_BEGINS, *_CAMERA_ENDS),
)
"""What the camera head of version 2 uses, and that of version 1: of the tokens, the camera's."""

_HEADS = "_gen_all_preds"
_HEADS_USED = {"cam_head", "depth_head", "transform_camera_vector", "enable_cam", "enable_depth"}
_CAMERAS = "transform_camera_vector"
_CAMERAS_USED = {"vector_to_camera_matrices", "linalg", "inv", "repeat", "cat"}


def _alternates(module: Any) -> bool:
    """Return True if a module has blocks and special tokens like WorldMirror's transformer."""
    parts = ("frame_blocks", "global_blocks", "cam_token", "reg_token", "patch_start_idx")
    return has(module, *parts, "patch_size", "pos_getter") and bool(
        attentions(module.global_blocks)
    )


def _is_transformer(module: Any) -> bool:
    return _alternates(module) and all(
        is_fused_attention(attn, _ARGUMENTS) for attn in attentions(module.global_blocks)
    )


def _explain_mismatch(root: nn.Module) -> str | None:
    found = locate(root, _TRANSFORMERS, _alternates)
    if found is None:
        return None
    reason = unlike(attentions(found[1].global_blocks)[0], _ARGUMENTS, "WorldMirror")
    if "sp_size" in reason:
        reason += (
            "; it was built for several devices. Build it with sp_size=1, and let spark3r share "
            "the clip: spark3r.apply(model, ..., group=...)"
        )
    return reason


def _transformer(root: nn.Module) -> tuple[str, Any]:
    return located(root, _TRANSFORMERS, _is_transformer, "WorldMirror")


def _attention(root: nn.Module) -> dict[str, nn.Module]:
    path, entry = _transformer(root)
    prefix = f"{path}." if path else ""
    modules = attentions(entry.global_blocks)
    return {f"{prefix}global_blocks.{i}.attn": attn for i, attn in enumerate(modules)}


def _layout(
    transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, TokenLayout]:
    images = clip_images(args, kwargs, "images", "visual_geometry_transformer")
    patch = transformer.patch_size
    height, width = images.shape[3] // patch, images.shape[4] // patch
    if transformer.pos_getter is not None:
        where = "visual_geometry_transformer.pos_getter.position_cache"
        cache = transformer.pos_getter.position_cache
        refuse_stale_positions(cache, (height, width), images.device, where)
    return images.shape[0], TokenLayout(
        frames=images.shape[1],
        height=height,
        width=width,
        special=transformer.patch_start_idx,
        anchor_frame=0,
    )


def _reduced_forward(
    attn: Any, layout: TokenLayout, rule: ResolvedRule, x: Tensor, pos: Tensor | None = None
) -> Tensor:
    refuse_dropout(attn)
    if _is_normalised(attn.rope):
        return reduced_attention(attn, layout, rule, x, partial(_normalised, attn, layout))
    prepare = partial(
        normalise_and_rotate,
        attn,
        layout,
        rotary=attn.rope is not None,
        cast_first=hasattr(attn, "_compute_qkv"),  # version 2
    )
    return reduced_attention(attn, layout, rule, x, prepare)


def _is_normalised(rope: Any) -> bool:
    """Return True if an embedding rotates by positions that are normalised to the image."""
    return has(rope, "periods", "normalize_coords", "_get_sincos_for_grid")


def _normalised(
    attn: Any,
    layout: TokenLayout,
    norm: nn.Module,
    make: Any,
    where: Where,
    dtype: torch.dtype,
) -> Tensor:
    """Return queries or keys as attention takes them; see `query_key.normalise_and_rotate`."""
    tokens = norm(make()).to(dtype)
    # Special tokens have position (0, 0), patches begin at (1, 1): the grid is larger by one.
    height, width = layout.height + 1, layout.width + 1
    tables = attn.rope._get_sincos_for_grid(height, width, tokens.device, dtype)
    place = torch.arange(height * width, device=tokens.device).view(height, width)
    patches = place[1:, 1:].reshape(-1)
    place = torch.cat((patches.new_zeros(layout.special), patches))
    sin, cos = (table.index_select(0, place) for table in tables)
    rows = rows_in_frame(where, layout)
    if rows is not None:
        return _rotated(tokens, sin.index_select(0, rows), cos.index_select(0, rows))
    return _rotated(tokens.unflatten(2, (-1, len(place))), sin, cos).flatten(2, 3)


def _rotated(tokens: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate ``[..., n, D]``, in which half of a head is turned against the other."""
    first, second = tokens.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1).mul_(sin).add_(tokens * cos)


def _look_up(self: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    """Replace the forward of a normalised embedding, which reads the size of the grid on the host.

    Args:
        self: The embedding.
        tokens: Queries or keys ``[B, H, N, D]``.
        positions: Integer positions ``[B, N, 2]``, row and column.
    """
    changed = (self.shift_coords, self.jitter_coords, self.rescale_coords)
    if self.training and any(each is not None for each in changed):
        turned: Tensor = type(self).forward(self, tokens, positions)
        return turned
    dtype = tokens.dtype
    size = (positions.amax(dim=(0, 1)) + 1).to(dtype)
    if self.normalize_coords != "separate":
        size = size.amax() if self.normalize_coords == "max" else size.amin()
    place = 2.0 * ((positions + 0.5).to(dtype) / size) - 1.0
    angle = (2 * torch.pi * place[..., None]) / self.periods.to(dtype)
    angle = torch.cat((angle.flatten(2), angle.flatten(2)), dim=-1)[:, None]
    return _rotated(tokens, angle.sin(), angle.cos())


def _camera_matrices(self: Any, params: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Replace upstream's method, which waits for the device to invert matrices.

    It returns camera-to-world matrices ``[B, S, 4, 4]`` and intrinsics ``[B, S, 3, 3]``.
    """
    convert = getattr(type(self), _CAMERAS).__globals__["vector_to_camera_matrices"]
    extrinsics, intrinsics = convert(params, image_hw=(height, width))
    last = extrinsics.new_zeros(*extrinsics.shape[:2], 1, 4)
    last[..., 3] = 1
    return torch.linalg.inv_ex(torch.cat((extrinsics, last), dim=2)).inverse, intrinsics


def _compile_fixes(root: nn.Module) -> Iterator[Replacement]:
    yield from without_waiting(root)
    for module in root.modules():
        named = arguments(module) == ("tokens", "positions")
        if _is_normalised(module) and named and not overridden(module):
            yield module, "forward", partial(_look_up, module)
    if set(names_used(root, _CAMERAS)) >= _CAMERAS_USED and not overridden(root, _CAMERAS):
        yield root, _CAMERAS, partial(_camera_matrices, root)


def _camera_and_depth(
    self: Any, tokens: list[Tensor], images: Tensor, start: int, *_: Any
) -> dict[str, Tensor]:
    """Replace the method that runs all heads: points, normals and splats are left out."""
    poses, intrinsics = self.transform_camera_vector(self.cam_head(tokens)[-1], *images.shape[-2:])
    depth, confidence, *_ = self.depth_head(tokens, images=images, patch_start_idx=start)
    return {
        "depth": depth,
        "depth_conf": confidence,
        "camera_poses": poses,
        "camera_intrs": intrinsics,
    }


def _unread(root: Any) -> Iterator[Replacement]:
    known = set(names_used(root, _HEADS)) >= _HEADS_USED and not overridden(root, _HEADS)
    if known and root.enable_cam and root.enable_depth:
        yield root, _HEADS, partial(_camera_and_depth, root)


def _predict(output: Any, images: Tensor) -> Prediction:
    # Depth and cameras, as upstream unprojects them; the point head is for whole scenes.
    depth, confidence, to_world, intrinsics = first_clip(
        output, "depth", "depth_conf", "camera_poses", "camera_intrs"
    )
    extrinsics = invert_pose(to_world[..., :3, :].float())
    return Prediction.from_depth(depth, confidence, extrinsics, intrinsics, pixel_centre=0.0)


def _metadata(root: nn.Module) -> dict[str, int]:
    transformer = _transformer(root)[1]
    return {
        "patch_size": transformer.patch_size,
        "special_tokens": transformer.patch_start_idx,
    }


def _frame_attention(root: nn.Module) -> list[nn.Module]:
    # Version 2 runs the kernels of flash-attn in frames, which are as fast.
    modules = fused_attentions(_transformer(root)[1].frame_blocks, _ARGUMENTS)
    return [] if any(hasattr(attn, "_compute_qkv") for attn in modules) else modules


def _memory_savers(root: nn.Module) -> Iterator[Replacement]:
    transformer = _transformer(root)[1]
    yield from aggregator_in_pieces(transformer, transformer.global_blocks, "pos", passed=("pos",))


def _sharding(root: Any, exchange: Exchange) -> Iterator[Replacement]:
    entry = _transformer(root)[1]
    exchange.first_tokens += [(entry, name) for name in ("cam_token", "reg_token")]
    camera = None if root is entry else getattr(root, "cam_head", None)
    if camera is not None:
        used = names_used(camera, "forward")
        refuse_unlike(camera, used if used in _CAMERA_USES else _CAMERA_USES[0], "camera head")
        yield from on_whole_clip(camera, exchange, partial(special_of_last, exchange, 1))
    splats = None if root is entry else getattr(root, "gs_head", None)
    if splats is not None:
        yield from refused(splats, exchange, "WorldMirror prunes the splats of all frames together")


FAMILY = Family(
    name="worldmirror",
    usage="model(views) with views['img'] [B, S, 3, H, W], or model.visual_geometry_transformer",
    matches=lambda root: locate(root, _TRANSFORMERS, _is_transformer) is not None,
    explain_mismatch=_explain_mismatch,
    attention=_attention,
    entry=lambda root: _transformer(root)[1],
    layout=_layout,
    reduced_forward=_reduced_forward,
    frame_attention=_frame_attention,
    frame_forward=_reduced_forward,
    call=lambda model, images: model({"img": images[None]}),
    predict=_predict,
    preprocess=crop_width,
    metadata=_metadata,
    compile_fixes=_compile_fixes,
    memory_savers=_memory_savers,
    unread=_unread,
    sharding=_sharding,
)
