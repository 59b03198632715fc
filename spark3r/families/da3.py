"""Depth-Anything-3: small, base, large, giant, and the nested model's any-view branch.

The backbone is a DINOv2 whose blocks from ``alt_start`` on alternate: odd ones attend globally,
even ones inside frames. Before the first global block, the backbone chooses a reference view, moves
it to slot 0 and gives it a camera token of its own. So slot 0 is the anchor frame, and the frames
of a layout are slots, not the caller's frames. In global blocks all patches have the same position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FamilyError
from ..layout import TokenLayout
from ..metrics import align_trajectories
from ..prediction import Prediction
from ..reduction.exchange import Exchange
from ..reduction.rule import ResolvedRule
from .base import MASKED, SAVES_MEMORY, Family, Replacement, unwrap
from .parts import da3_memory
from .parts.outputs import first_clip
from .parts.preprocessing import imagenet_normalised, longest_side
from .parts.query_key import normalise_and_rotate
from .parts.recognition import (
    arguments,
    attentions,
    clip_images,
    fused_attentions,
    has,
    is_fused_attention,
    locate,
    located,
    refuse_argument,
    refuse_dropout,
    refuse_stale_positions,
    unlike,
)
from .parts.reduced import reduced_attention
from .parts.rotary import without_waiting
from .parts.sharded import refused

# Paths to the backbone: of the network, of it inside the API object, of the nested network, of that
# inside the API object, and the backbone itself.
_BACKBONES = ("backbone", "model.backbone", "da3.backbone", "model.da3.backbone", "")
_ARGUMENTS = ("x", "pos", "attn_mask")
_OF_ALL_FRAMES = (
    ("cam_enc", "Depth-Anything-3's encoder of given cameras attends over all frames"),
    ("gs_head", "Depth-Anything-3 makes Gaussians of all frames"),
)

_STRATEGY, _FIRST = "ref_view_strategy", "first"
_FEWEST_REORDERED = 3  # frames, upstream's THRESH_FOR_REF_SELECTION


def _is_transformer(backbone: Any) -> bool:
    inner = getattr(backbone, "pretrained", None)
    parts = ("blocks", "patch_embed", "patch_size")
    return has(inner, *parts) and bool(attentions(getattr(inner, "blocks", None)))


def _global(backbone: Any) -> dict[str, nn.Module]:
    """Return the global attention modules by their name inside the backbone."""
    inner = backbone.pretrained
    start = getattr(inner, "alt_start", -1)
    if start < 0:
        return {}
    return {
        f"pretrained.blocks.{i}.attn": attn
        for i, attn in enumerate(attentions(inner.blocks))
        if i >= start and i % 2 == 1
    }


def _is_backbone(backbone: Any) -> bool:
    if not _is_transformer(backbone):
        return False
    found = _global(backbone).values()
    return bool(found) and all(is_fused_attention(attn, _ARGUMENTS) for attn in found)


def _explain_mismatch(root: nn.Module) -> str | None:
    found = locate(root, _BACKBONES, _is_transformer)
    if found is None:
        return None
    _, backbone = found
    if not hasattr(backbone.pretrained, "alt_start"):
        return (
            "its backbone attends inside each frame only, like Depth-Anything 1 and 2, so there is "
            "no global attention to reduce"
        )
    modules = list(_global(backbone).values())
    if not modules:
        return (
            "it is a metric or monocular Depth-Anything-3, which attends inside each frame only, "
            "so there is no global attention to reduce"
        )
    return unlike(modules[0], _ARGUMENTS, "Depth-Anything-3")


def _backbone(root: nn.Module) -> tuple[str, Any]:
    return located(root, _BACKBONES, _is_backbone, "Depth-Anything-3")


def _attention(root: nn.Module) -> dict[str, nn.Module]:
    path, backbone = _backbone(root)
    prefix = f"{path}." if path else ""
    return {prefix + name: attn for name, attn in _global(backbone).items()}


def _frame_attention(root: nn.Module) -> list[nn.Module]:
    """Return the attention inside frames that has norms or a rotary embedding."""
    backbone = _backbone(root)[1]
    whole = set(_global(backbone).values())
    return [
        attn
        for attn in fused_attentions(backbone.pretrained.blocks, _ARGUMENTS)
        if attn not in whole and getattr(attn, "rope", None) is not None
    ]


def _layout(
    backbone: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, TokenLayout]:
    images = clip_images(args, kwargs, "x", "backbone")
    inner = backbone.pretrained
    height, width = images.shape[3] // inner.patch_size, images.shape[4] // inner.patch_size
    getter = getattr(inner, "position_getter", None)
    if getter is not None:
        where = "backbone.pretrained.position_getter.position_cache"
        refuse_stale_positions(getter.position_cache, (height, width), images.device, where)
    # Given cameras make a camera token for every frame; otherwise only slot 0 has its own.
    cameras_given = kwargs.get("cam_token") is not None
    return images.shape[0], TokenLayout(
        frames=images.shape[1],
        height=height,
        width=width,
        special=1 + inner.num_register_tokens,
        anchor_frame=None if cameras_given else 0,
    )


def _reorders(backbone: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    frames = clip_images(args, kwargs, "x", "backbone").shape[1]
    if frames < _FEWEST_REORDERED or kwargs.get("cam_token") is not None:
        return None
    if kwargs.get(_STRATEGY) == _FIRST:
        return None
    return (
        "Depth-Anything-3 moves a reference view that it chooses itself to the front: pass "
        f'{_STRATEGY}="{_FIRST}" to the model'
    )


def _reduced_forward(
    attn: Any,
    layout: TokenLayout,
    rule: ResolvedRule,
    x: Tensor,
    pos: Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    uniform: bool = True,
) -> Tensor:
    refuse_argument(attn, "attn_mask", attn_mask)
    refuse_dropout(attn)
    rotary = attn.rope is not None and pos is not None
    prepare = partial(normalise_and_rotate, attn, layout, rotary=rotary, uniform=uniform)
    return reduced_attention(attn, layout, rule, x, prepare)


def _call(model: nn.Module, images: Tensor, **cameras: Tensor) -> Any:
    # The network expects normalised images, and the API object has no default for its exports.
    exported: dict[str, Any] = (
        {"export_feat_layers": []} if "infer_gs" in arguments(unwrap(model)) else {}
    )
    if MASKED in unwrap(model).__dict__ and _STRATEGY in arguments(unwrap(model)):
        exported[_STRATEGY] = _FIRST
    saves_memory = model is unwrap(model) and SAVES_MEMORY in model.__dict__
    normalised = da3_memory.on_demand if saves_memory else imagenet_normalised
    return model(normalised(images[None]), **cameras, **exported)


def _call_with_cameras(
    model: nn.Module, images: Tensor, extrinsics: Tensor, intrinsics: Tensor
) -> Any:
    """Do what upstream's API object does with given cameras around the network's own call."""
    root = unwrap(model)
    if not any(getattr(each, "cam_enc", None) is not None for each in root.modules()):
        raise FamilyError("this Depth-Anything-3 has no camera encoder, so it takes no cameras")
    given = {"extrinsics": _normalised(extrinsics.double())[None].to(images)}
    if "intrinsics" in arguments(root):
        given["intrinsics"] = intrinsics[None].to(images)
    output = _call(model, images, **given)
    own = output["extrinsics"][0, :, :3].double()
    scale = align_trajectories(own, extrinsics.to(own)).similarity.scale
    output["depth"] = output["depth"] * scale.to(output["depth"])
    output["extrinsics"] = extrinsics[None].to(output["extrinsics"])
    output["intrinsics"] = intrinsics[None].to(output["intrinsics"])
    return output


def _normalised(extrinsics: Tensor) -> Tensor:
    """Return poses ``[S, 4, 4]`` relative to the first, whose median distance from it is 1."""
    last = extrinsics.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(len(extrinsics), 1, 4)
    whole = torch.cat((extrinsics, last), dim=1)
    relative = whole @ whole[0].inverse()
    distance = relative.inverse()[:, :3, 3].norm(dim=-1).median().clamp_min(0.1)
    relative[:, :3, 3] /= distance
    return relative


def _predict(output: Any, images: Tensor) -> Prediction:
    names = ("depth", "depth_conf", "extrinsics", "intrinsics")
    depth, confidence, extrinsics, intrinsics = first_clip(output, *names)
    # Depth-Anything-3's own exports unproject whole pixels.
    return Prediction.from_depth(depth, confidence, extrinsics, intrinsics, pixel_centre=0.0)


def _metadata(root: nn.Module) -> dict[str, int]:
    inner = _backbone(root)[1].pretrained
    return {"patch_size": inner.patch_size, "special_tokens": 1 + inner.num_register_tokens}


# The half of the dense head that predicts rays: per level a fusion block, a neck and a projection.
_RAY_FUSION = ("refinenet4_aux", "refinenet3_aux", "refinenet2_aux", "refinenet1_aux")
_RAY_LEVELS = ("output_conv1_aux", "output_conv2_aux")


def _unread(root: Any) -> Iterator[Replacement]:
    """Yield what leaves out the rays, which upstream drops where a decoder predicts cameras.

    The convolutions of the rays share nothing with those of depth. In their place a corner of the
    lowest level passes through.
    """
    for network in root.modules():
        scratch: Any = getattr(getattr(network, "head", None), "scratch", None)
        has_cameras = getattr(network, "cam_dec", None) is not None
        if not has_cameras or not has(scratch, *_RAY_FUSION, *_RAY_LEVELS):
            continue
        for name, function in zip(_RAY_FUSION, (_corner, _first, _first, _first), strict=True):
            yield scratch, name, function
        for name in _RAY_LEVELS:
            yield scratch, name, (_first,) * len(getattr(scratch, name))


def _corner(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x[..., :1, :1].clone()


def _first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _part(root: nn.Module, name: str) -> nn.Module | None:
    """Return a part of the network whose backbone is reduced, or None if it has none."""
    backbone = _backbone(root)[1]
    for network in root.modules():
        if unwrap(getattr(network, "backbone", network)) is backbone and network is not backbone:
            found = getattr(network, name, None)
            return found if isinstance(found, nn.Module) else None
    return None


def _memory_savers(root: nn.Module) -> Iterator[Replacement]:
    attention = _attention(root).values()
    return da3_memory.memory_savers(_backbone(root)[1].pretrained, attention, _part(root, "head"))


def _prediction_savers(root: nn.Module) -> Iterator[Replacement]:
    return da3_memory.prediction_savers(_backbone(root)[1].pretrained, _part(root, "head"))


def _sharding(root: nn.Module, exchange: Exchange) -> Iterator[Replacement]:
    path, backbone = _backbone(root)
    if "da3" in path.split("."):
        raise FamilyError(
            "the nested Depth-Anything-3 aligns its two depths over all frames, so several "
            "processes cannot share a clip: use one of its other models, or one process"
        )
    exchange.first_tokens.append((backbone.pretrained, "camera_token"))
    yield from da3_memory.shared_views(backbone.pretrained, exchange)
    for name, what in _OF_ALL_FRAMES:
        part = _part(root, name)
        if part is not None:
            yield from refused(part, exchange, what)


FAMILY = Family(
    name="da3",
    usage="model.inference(images), or the network itself with images [B, S, 3, H, W]",
    matches=lambda root: locate(root, _BACKBONES, _is_backbone) is not None,
    explain_mismatch=_explain_mismatch,
    attention=_attention,
    entry=lambda root: _backbone(root)[1],
    layout=_layout,
    reduced_forward=_reduced_forward,
    frame_attention=_frame_attention,
    frame_forward=partial(_reduced_forward, uniform=False),
    call=_call,
    call_with_cameras=_call_with_cameras,
    predict=_predict,
    preprocess=longest_side,
    reorders=_reorders,
    metadata=_metadata,
    compile_fixes=without_waiting,
    memory_savers=_memory_savers,
    prediction_savers=_prediction_savers,
    unread=_unread,
    sharding=_sharding,
)
