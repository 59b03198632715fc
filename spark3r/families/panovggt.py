"""PanoVGGT: panoramas through a decoder like π³'s, even blocks inside frames, odd ones global.

A frame has five registers, the same in all frames, and the patches. Before every block an embedding
of the direction of a patch is added to the tokens. The entry is the aggregator. Points are the
distance along each pixel's ray; there is no pinhole camera.
"""

from __future__ import annotations

import math
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
from .parts.memory import (
    by_frames,
    encoder_by_frames,
    global_block_in_pieces,
    in_pieces,
    most_frames,
)
from .parts.outputs import first_clip
from .parts.pinned import pinned_kernels
from .parts.preprocessing import panorama
from .parts.query_key import normalise_and_rotate
from .parts.recognition import (
    attentions,
    clip_images,
    fused_attentions,
    has,
    is_fused_attention,
    locate,
    located,
    names_within,
    refuse_dropout,
    refuse_stale_positions,
    unlike,
)
from .parts.reduced import reduced_attention
from .parts.rotary import without_waiting
from .parts.sharded import refused

_AGGREGATORS = ("aggregator", "")
_ARGUMENTS = ("x", "xpos", "kwargs")
_PREDICTS = {
    *("aggregator", "patch_size", "position_getter", "_get_branch_pos_embed", "point_decoder"),
    *("point_head", "_get_direction_vectors", "camera_decoder", "camera_head", "enable_point"),
    *("enable_camera", "global_points_decoder", "global_point_head"),
}
_DIRECTIONS = "_get_direction_vectors"
_POSES = ("_build_pose_matrix", "_is_valid_tensor")


def _alternates(module: Any) -> bool:
    """Return True if a module has a decoder like PanoVGGT's aggregator."""
    parts = ("decoder", "register_token", "patch_start_idx", "patch_size", "use_pano_pos")
    return has(module, *parts) and len(attentions(module.decoder)) > 1


def _global(aggregator: Any) -> dict[str, nn.Module]:
    modules = attentions(aggregator.decoder)
    return {f"decoder.{i}.attn": modules[i] for i in range(1, len(modules), 2)}


def _is_aggregator(module: Any) -> bool:
    return _alternates(module) and all(
        is_fused_attention(attn, _ARGUMENTS) for attn in _global(module).values()
    )


def _explain_mismatch(root: nn.Module) -> str | None:
    found = locate(root, _AGGREGATORS, _alternates)
    if found is None:
        return None
    return unlike(next(iter(_global(found[1]).values())), _ARGUMENTS, "PanoVGGT")


def _aggregator(root: nn.Module) -> tuple[str, Any]:
    return located(root, _AGGREGATORS, _is_aggregator, "PanoVGGT")


def _attention(root: nn.Module) -> dict[str, nn.Module]:
    path, aggregator = _aggregator(root)
    prefix = f"{path}." if path else ""
    return {prefix + name: attn for name, attn in _global(aggregator).items()}


def _layout(
    aggregator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, TokenLayout]:
    images = clip_images(args, kwargs, "images", "aggregator")
    patch = aggregator.patch_size
    height, width = images.shape[3] // patch, images.shape[4] // patch
    getter = getattr(aggregator, "position_getter", None)
    if getter is not None:
        where = "aggregator.position_getter.cache_positions"
        refuse_stale_positions(getter.cache_positions, (height, width), images.device, where)
    return images.shape[0], TokenLayout(
        frames=images.shape[1], height=height, width=width, special=aggregator.patch_start_idx
    )


def _reduced_forward(
    attn: Any, layout: TokenLayout, rule: ResolvedRule, x: Tensor, xpos: Tensor | None = None
) -> Tensor:
    refuse_dropout(attn)
    prepare = partial(
        normalise_and_rotate, attn, layout, rotary=attn.rope is not None, cast_first=True
    )
    return reduced_attention(attn, layout, rule, x, prepare, pinned_kernels)


def _predict(output: Any, images: Tensor) -> Prediction:
    """Return the prediction of panoramas.

    Depth is the distance along a pixel's ray, and not z. Intrinsics are pixels per radian, which
    are a pinhole camera's in the middle of the image alone. There is no confidence.
    """
    points, to_world = first_clip(output, "local_points", "camera_poses")
    points, to_world = points.float(), to_world[..., :3, :].float()
    frames, height, width, _ = points.shape
    depth = points.norm(dim=-1)
    intrinsics = points.new_zeros(frames, 3, 3)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = width / (2 * math.pi), height / math.pi
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = width / 2, height / 2, 1
    world = points @ to_world[:, None, :, :3].transpose(-1, -2) + to_world[:, None, None, :, 3]
    return Prediction(depth, torch.ones_like(depth), invert_pose(to_world), intrinsics, world)


def _unread(root: nn.Module) -> Iterator[Replacement]:
    known = names_within(root, "forward") >= _PREDICTS and not overridden(root)
    if known and root.enable_point and root.enable_camera:
        yield root, "forward", partial(_points_and_cameras, root)


def _points_and_cameras(self: Any, images: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Replace the model's forward: it computes what a Prediction reads, a few frames at a time."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        output: dict[str, Tensor] = type(self).forward(self, images, *args, **kwargs)
        return output
    images = images if images.ndim == 5 else images[None]
    batch, frames, _, height, width = images.shape
    grid = (height // self.patch_size, width // self.patch_size)
    layers, start, *_ = self.aggregator(images)
    tokens = layers[-1].flatten(0, 1)
    del layers
    pos = None
    if self.aggregator.rope is not None:
        pos = self.aggregator.position_getter(len(tokens), *grid, tokens.device) + 1
        pos = torch.cat((pos.new_zeros(len(pos), start, 2), pos), dim=1)

    def decoded(branch: str, some: slice) -> Tensor:
        embedding = self._get_branch_pos_embed(
            *grid, start, tokens.device, tokens.dtype, branch, len(tokens[some])
        )
        where = None if pos is None else pos[some]
        decoder = getattr(self, f"{branch}_decoder")
        hidden: Tensor = decoder(tokens[some], pos_embed=embedding, xpos=where)
        return hidden.float()[:, start:]

    def points(some: slice) -> Tensor:
        hidden = decoded("point", some)
        with torch.autocast("cuda", enabled=False):
            depth = self.point_head([hidden], (height, width))[..., 2].exp()[..., None]
            return self._get_direction_vectors(height, width, depth.device, depth.dtype) * depth

    def poses(some: slice) -> Tensor:
        hidden = decoded("camera", some)
        with torch.autocast("cuda", enabled=False):
            found: Tensor = self.camera_head(hidden, *grid)
            return found

    whole = (batch, frames)
    return {
        "local_points": in_pieces(points, len(tokens), most_frames()).unflatten(0, whole),
        "camera_poses": in_pieces(poses, len(tokens), most_frames()).unflatten(0, whole),
    }


def _compile_fixes(root: Any) -> Iterator[Replacement]:
    yield from without_waiting(root)
    if hasattr(root, _DIRECTIONS) and not overridden(root, _DIRECTIONS):
        yield root, _DIRECTIONS, _directions
    camera: Any = getattr(root, "camera_head", None)
    known = isinstance(camera, nn.Module) and has(camera, *_POSES, "_orthogonalize_rotation")
    if known and not any(overridden(camera, name) for name in _POSES):
        yield camera, "_is_valid_tensor", _is_taken_for_valid
        yield camera, "_build_pose_matrix", partial(_pose_matrices, camera)


def _directions(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the directions of pixels ``[H, W, 3]``, whose cache upstream reads on the host."""
    u = torch.arange(width, device=device, dtype=dtype) + 0.5
    v = torch.arange(height, device=device, dtype=dtype) + 0.5
    phi = (u / width - 0.5) * 2 * torch.pi
    theta = -(v / height - 0.5) * torch.pi
    theta, phi = torch.meshgrid(theta, phi, indexing="ij")
    x, z = theta.cos() * phi.sin(), theta.cos() * phi.cos()
    return torch.stack((x, -theta.sin(), z), dim=-1)


def _is_taken_for_valid(values: Tensor) -> bool:
    return True


def _pose_matrices(
    self: Any, rotations: Tensor, translations: Tensor, count: int, device: torch.device
) -> Tensor:
    """Return poses ``[B, 4, 4]`` of nine numbers each, without asking on the host if any is NaN.

    Args:
        self: The camera head.
        rotations: Numbers ``[B, 9]``, of which the nearest rotations are taken.
        translations: ``[B, 3]``.
        count: Number of poses B.
        device: Their device.
    """
    rows = rotations.float().reshape(-1, 3, 3)
    length = torch.norm(rows, p=2, dim=-1, keepdim=True)
    length = torch.where(length < 1e-8, torch.ones_like(length), length)
    left, _, right = torch.linalg.svd((rows / length).transpose(-2, -1))
    right = right.transpose(-2, -1)
    turned = right @ left.transpose(-2, -1)
    signs = torch.ones(count, 3, 3, device=device)
    signs[:, :, 2] = torch.det(turned).sign().view(-1, 1)
    turned = (right * signs) @ left.transpose(-2, -1)
    same = torch.eye(3, device=device).expand(count, 3, 3)
    turned = torch.where(turned.isfinite().all(), turned, same).to(rotations.dtype)
    pose = torch.zeros(count, 4, 4, device=device, dtype=turned.dtype)
    pose[:, :3, :3], pose[:, :3, 3], pose[:, 3, 3] = turned, translations, 1.0
    return pose


def _memory_savers(root: nn.Module) -> Iterator[Replacement]:
    aggregator = _aggregator(root)[1]
    yield from encoder_by_frames(aggregator.patch_embed)
    for i, block in enumerate(aggregator.decoder):
        if i % 2:
            yield from global_block_in_pieces(block, "xpos")
        else:
            yield from by_frames(block, "xpos")


def _metadata(root: nn.Module) -> dict[str, int]:
    aggregator = _aggregator(root)[1]
    return {"patch_size": aggregator.patch_size, "special_tokens": aggregator.patch_start_idx}


def _sharding(root: Any, exchange: Exchange) -> Iterator[Replacement]:
    # The points in the system of the middle frame are left out of passes of a Runner.
    decoder = getattr(root, "global_points_decoder", None)
    if decoder is not None:
        what = "PanoVGGT's global points are those of the middle frame of the clip"
        yield from refused(decoder, exchange, what)


FAMILY = Family(
    name="panovggt",
    usage="model(images) or model.aggregator(images)",
    matches=lambda root: locate(root, _AGGREGATORS, _is_aggregator) is not None,
    explain_mismatch=_explain_mismatch,
    attention=_attention,
    entry=lambda root: _aggregator(root)[1],
    layout=_layout,
    reduced_forward=_reduced_forward,
    frame_attention=lambda root: fused_attentions(_aggregator(root)[1].decoder, _ARGUMENTS)[::2],
    frame_forward=_reduced_forward,
    predict=_predict,
    preprocess=panorama,
    pinhole=False,
    metadata=_metadata,
    compile_fixes=_compile_fixes,
    memory_savers=_memory_savers,
    unread=_unread,
    sharding=_sharding,
)
