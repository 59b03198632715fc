"""MapAnything: a DINOv2 encoder, then blocks that alternate, even ones global, odd ones in frames.

A frame has its patches and then, in version 1.1, the encoder's class token; after all frames stands
one token for the metric scale. Frame 0 is told from the others by a vector that is added to its
tokens. Global attention has no positions. The entry is the transformer ``info_sharing``, because
``infer`` calls ``forward`` as a method, and hooks on the model do not fire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FamilyError, LayoutError
from ..geometry import quaternion_to_matrix
from ..layout import TokenLayout
from ..prediction import Prediction
from ..reduction.rule import ResolvedRule
from .base import Family, Replacement, overridden, unwrap
from .parts.memory import by_frames, encoder_by_frames, global_block_in_pieces
from .parts.outputs import first_clip
from .parts.preprocessing import closest_shape, imagenet_normalised
from .parts.query_key import Where
from .parts.recognition import (
    arguments,
    attentions,
    has,
    is_fused_attention,
    locate,
    located,
    names_used,
    refuse_dropout,
    unlike,
)
from .parts.reduced import reduced_attention

HEAD_FRAMES = 8
"""Frames that the heads take at a time, which upstream leaves to its caller."""

_TRANSFORMERS = ("info_sharing", "")
_ARGUMENTS = ("x", "xpos")
_FUSION = "_encode_and_fuse_optional_geometric_inputs"
_FUSION_USES = {
    *("_compute_pose_quats_and_trans_for_across_views_in_ref_view", "_encode_and_fuse_ray_dirs"),
    *("_encode_and_fuse_depths", "_encode_and_fuse_cam_quats_and_trans", "geometric_input_config"),
    *("fusion_norm_layer", "cat", "chunk", "contiguous", "device", "dtype", "len", "permute"),
    *("rand", "repeat", "shape", "torch"),
}
"""What upstream's method uses. Another version is left alone."""

_OTHER_INPUTS = ("ray_directions_cam", "depth_along_ray", "camera_pose_quats")
_READ = ("pts3d_cam", "conf", "cam_quats", "cam_trans")


def _alternates(module: Any) -> bool:
    """Return True if a module has blocks like those of MapAnything's transformer.

    The parts of upstream's other transformer, whose blocks are all global, have the same names.
    """
    parts = ("self_attention_blocks", "input_embed_dim", "distinguish_ref_and_non_ref_views")
    return (
        has(module, *parts)
        and any("Alternating" in kind.__name__ for kind in type(module).__mro__)
        and len(attentions(module.self_attention_blocks)) > 1
    )


def _global(transformer: Any) -> dict[str, Any]:
    """Return the global attention modules by their name inside the transformer."""
    modules = attentions(transformer.self_attention_blocks)[::2]
    return {f"self_attention_blocks.{2 * i}.attn": attn for i, attn in enumerate(modules)}


def _is_transformer(module: Any) -> bool:
    return _alternates(module) and all(
        is_fused_attention(attn, _ARGUMENTS)
        and getattr(attn, "custom_positional_encoding", None) is None
        for attn in _global(module).values()
    )


def _explain_mismatch(root: nn.Module) -> str | None:
    found = locate(root, _TRANSFORMERS, _alternates)
    if found is None:
        return None
    attn = next(iter(_global(found[1]).values()))
    if is_fused_attention(attn, _ARGUMENTS):
        return "it looks like MapAnything, but its attention has a positional encoding of its own"
    return unlike(attn, _ARGUMENTS, "MapAnything")


def _transformer(root: nn.Module) -> tuple[str, Any]:
    return located(root, _TRANSFORMERS, _is_transformer, "MapAnything")


def _attention(root: nn.Module) -> dict[str, nn.Module]:
    path, transformer = _transformer(root)
    prefix = f"{path}." if path else ""
    return {prefix + name: attn for name, attn in _global(transformer).items()}


def _layout(
    transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, TokenLayout]:
    given = args[0] if args else kwargs.get("model_input")
    features = getattr(given, "features", None)
    if not isinstance(features, (list, tuple)) or not features:
        raise LayoutError(
            f"MapAnything's transformer was given {type(given).__name__}, expected the features "
            "[B, C, h, w] of every view: call model.infer(views) or model(views)"
        )
    shapes = {tuple(each.shape) for each in features}
    if len(shapes) > 1 or len(features[0].shape) != 4:
        shown = " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
        raise LayoutError(
            f"the features of the views have shapes {shown}, expected [B, C, h, w] of one size"
        )
    batch, _, height, width = features[0].shape
    own = getattr(given, "additional_input_tokens_per_view", None)
    shared = getattr(given, "additional_input_tokens", None)
    return batch, TokenLayout(
        frames=len(features),
        height=height,
        width=width,
        special=0 if own is None else own[0].shape[2],
        special_last=True,
        tail=0 if shared is None else shared.shape[2],
        anchor_frame=0 if transformer.distinguish_ref_and_non_ref_views else None,
    )


def _reduced_forward(
    attn: Any, layout: TokenLayout, rule: ResolvedRule, x: Tensor, xpos: Any = None
) -> Tensor:
    refuse_dropout(attn)
    prepare = partial(_prepared, attn, layout)
    return reduced_attention(attn, layout, rule, x, prepare)


def _prepared(
    attn: Any,
    layout: TokenLayout,
    norm: nn.Module | None,
    make: Callable[[], Tensor],
    where: Where,
    dtype: torch.dtype,
) -> Tensor:
    """Return queries or keys as attention takes them, see `reduced.Prepare`."""
    tokens: Tensor = make() if norm is None else norm(make())
    return (_scaled(attn, tokens, layout.tokens) if norm is attn.q_norm else tokens).to(dtype)


def _scaled(attn: Any, query: Tensor, tokens: int) -> Tensor:
    """Return queries that are scaled by the length of the whole sequence, if the model does so."""
    scalable = getattr(attn, "use_scalable_softmax", False)
    entropy = getattr(attn, "use_entropy_scaling", False)
    if not scalable and not entropy:
        return query
    length = torch.full((), tokens, device=query.device).log()  # no copy, which would wait
    if scalable:
        query = query * length
    if entropy:
        base = torch.full((), attn.base_token_count_for_entropy_scaling, device=query.device).log()
        query = query * torch.sqrt(attn.entropy_scaling_growth_factor * length / base)
    return query


def _call(model: nn.Module, images: Tensor) -> Any:
    root: Any = next(each for each in unwrap(model).modules() if hasattr(each, "info_sharing"))
    kind, patch = root.encoder.data_norm_type, root.encoder.patch_size
    if kind != "dinov2":
        raise FamilyError(
            f"the encoder of this MapAnything expects images normalised as '{kind}', and spark3r "
            "knows 'dinov2' alone: call the model with views of your own"
        )
    if images.shape[-2] % patch or images.shape[-1] % patch:
        raise LayoutError(
            f"MapAnything was given images of {images.shape[-1]}x{images.shape[-2]} pixels, "
            f"expected sides that are multiples of {patch}"
        )
    views = [{"img": each[None], "data_norm_type": [kind]} for each in imagenet_normalised(images)]
    options = {"memory_efficient_inference": True, "minibatch_size": HEAD_FRAMES}
    known = arguments(root)
    return model(views, **{name: value for name, value in options.items() if name in known})


def _predict(output: Any, images: Tensor) -> Prediction:
    views = list(output)
    names = [name for name in _READ if views and name in views[0]]
    found = {name: torch.stack([view[name] for view in views], dim=1) for name in names}
    points, confidence, quaternions, centres = first_clip(found, *_READ)
    poses = torch.cat((quaternion_to_matrix(quaternions), centres[..., None]), dim=-1)
    return Prediction.from_local_points(points, confidence, poses)


def _metadata(root: Any) -> dict[str, int]:
    has_class_token = getattr(root, "use_register_tokens_from_encoder", False)
    encoder = getattr(root, "encoder", None)
    registers = getattr(getattr(encoder, "model", None), "num_register_tokens", 0)
    return {
        "patch_size": getattr(encoder, "patch_size", 14),
        "special_tokens": 1 + registers if has_class_token else 0,
    }


def _compile_fixes(root: nn.Module) -> Iterator[Replacement]:
    if set(names_used(root, _FUSION)) == _FUSION_USES and not overridden(root, _FUSION):
        yield root, _FUSION, partial(_without_other_inputs, root)


def _without_other_inputs(
    self: Any, views: Sequence[Mapping[str, Any]], features: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Replace the fusion of rays, depth and cameras, which upstream encodes if none are given, too.

    It adds zeros for every one of them, after it has drawn a random number on the host. Training
    goes through those encoders, so that their parameters get a gradient of zero.
    """
    if self.training or any(name in view for view in views for name in _OTHER_INPUTS):
        fused: Sequence[Tensor] = getattr(type(self), _FUSION)(self, views, features)
        return fused
    joined = torch.cat(list(features)).permute(0, 2, 3, 1).contiguous()
    joined = self.fusion_norm_layer(joined).permute(0, 3, 1, 2).contiguous()
    return joined.chunk(len(views))


def _memory_savers(root: nn.Module) -> Iterator[Replacement]:
    yield from encoder_by_frames(getattr(getattr(root, "encoder", None), "model", root))
    for i, block in enumerate(_transformer(root)[1].self_attention_blocks):
        if i % 2:
            yield from by_frames(block)
        else:
            yield from global_block_in_pieces(block, "xpos")


FAMILY = Family(
    name="mapanything",
    usage="model.infer(views) or model(views), with views of one size",
    matches=lambda root: locate(root, _TRANSFORMERS, _is_transformer) is not None,
    explain_mismatch=_explain_mismatch,
    attention=_attention,
    entry=lambda root: _transformer(root)[1],
    layout=_layout,
    reduced_forward=_reduced_forward,
    call=_call,
    predict=_predict,
    preprocess=closest_shape,
    metadata=_metadata,
    compile_fixes=_compile_fixes,
    memory_savers=_memory_savers,
)
