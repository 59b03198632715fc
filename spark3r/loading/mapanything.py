"""MapAnything's architecture: what its published configurations say, and how it is built offline.

Upstream builds a model from a configuration that lies beside the weights, and fetches DINOv2 with
torch.hub first, code and weights. Here the configurations are those of its repository, and DINOv2
is the copy of its code that the package holds. The weights are in MapAnything's own checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

VARIANTS = {
    # Encoder, its blocks, the transformer's depth, width, heads, and the layers that heads read.
    "v1.1": ("giant", 24, 16, 1536, 24, (7, 11)),
    "v1": ("large", None, 24, 768, 12, (11, 17)),
}
"""The models of January 2026, and those of September 2025."""


def variant(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the variant of a checkpoint's tensors, None if they fit none."""
    weight = tensors.get("info_sharing.self_attention_blocks.0.attn.qkv.weight")
    if weight is None:
        return None
    widths = {width: name for name, (_, _, _, width, _, _) in VARIANTS.items()}
    return widths.get(weight.shape[0] // 3)


def build(variant: str, module: Callable[[str], Any]) -> nn.Module:
    """Return a variant with random weights; ``module`` imports modules of upstream's code."""
    made: nn.Module
    backbones = module("mapanything.models.external.dinov2.hub.backbones")
    # Upstream prints that it fetches weights, which is not so.
    with dinov2_of(backbones), contextlib.redirect_stdout(io.StringIO()):
        made = module("mapanything.models.mapanything").MapAnything(**configuration(variant))
    return made


@contextlib.contextmanager
def dinov2_of(backbones: Any) -> Iterator[None]:
    """Return a context in which torch.hub builds DINOv2 from a module, and without weights."""
    own = torch.hub.load

    def load(repository: str, name: str, **_: Any) -> nn.Module:
        made: nn.Module = getattr(backbones, name)(pretrained=False)
        return made

    torch.hub.load = load  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.hub.load = own


def configuration(variant: str) -> dict[str, Any]:
    """Return the arguments of upstream's constructor for a variant."""
    size, kept, depth, width, heads, read = VARIANTS[variant]
    newer = variant != "v1"
    encoder = {
        "encoder_str": "dinov2",
        "name": f"dinov2_{size}",
        "data_norm_type": "dinov2",
        "size": size,
        "with_registers": False,
        "uses_torch_hub": True,
        "gradient_checkpointing": False,
        "norm_returned_features": not newer,
        "keep_first_n_layers": kept,
    }
    transformer = {
        "name": f"aat_{depth}_layers_ifr",
        "indices": list(read),
        "norm_intermediate": True,
        "size": f"{depth}_layers",
        "depth": depth,
        "distinguish_ref_and_non_ref_views": True,
        "gradient_checkpointing": False,
        "dim": width,
        "num_heads": heads,
        "mlp_ratio": 4,
        "qkv_bias": True,
        "qk_norm": False,
        "init_values": 1e-5 if newer else None,
    }
    return {
        "name": "mapanything",
        "encoder_config": encoder,
        "info_sharing_config": {
            "model_type": "alternating_attention",
            "model_return_type": "intermediate_features",
            "custom_positional_encoding": None,
            "module_args": transformer,
        },
        "pred_head_config": _heads(),
        "geometric_input_config": _other_inputs(),
        "use_register_tokens_from_encoder": newer,
        "info_sharing_mlp_layer_str": "swiglufused" if newer else "mlp",
    }


def _heads() -> dict[str, Any]:
    name = "raydirs+depth+pose+confidence+mask+scale"
    free = {"vmin": -math.inf, "vmax": math.inf}
    return {
        "type": "dpt+pose",
        "feature_head": {"feature_dim": 256, "hooks": [0, 1, 2, 3], "checkpoint_gradient": False},
        "regressor_head": {"output_dim": 6, "checkpoint_gradient": False},
        "pose_head": {"num_resconv_block": 2, "rot_representation_dim": 4},
        "scale_head": {"output_dim": 1},
        "adaptor_type": "raydirs+depth+pose+confidence+mask",
        "dpt_adaptor": {
            "name": name,
            "ray_directions_mode": "linear",
            "ray_directions_normalize_to_unit_sphere": True,
            "ray_directions_normalize_to_unit_image_plane": False,
            **{f"ray_directions_{key}": value for key, value in free.items()},
            "ray_directions_clamp_min_of_z_dir": False,
            "ray_directions_z_dir_min": -math.inf,
            "depth_mode": "exp",
            "depth_vmin": 0,
            "depth_vmax": math.inf,
            "confidence_type": "exp",
            "confidence_vmin": 1,
            "confidence_vmax": math.inf,
        },
        "pose_adaptor": {
            "name": name,
            "cam_trans_mode": "linear",
            **{f"cam_trans_{key}": value for key, value in free.items()},
            "quaternions_mode": "linear",
            "quaternions_normalize": True,
            **{f"quaternions_{key}": value for key, value in free.items()},
        },
        "scale_adaptor": {"name": name, "mode": "exp", "vmin": 1e-8, "vmax": math.inf},
    }


def _other_inputs() -> dict[str, Any]:
    """Return the encoders of rays, depth and cameras, which are given for no view."""
    shares = ("overall", "ray_dirs", "depth", "cam", "sparse_depth")
    scales = ("depth_scale_norm_all_prob", "pose_scale_norm_all_prob")
    dense = {"encoder_str": "dense_rep_encoder", "apply_pe": False}
    whole = {"encoder_str": "global_rep_encoder"}
    return {
        **{f"{share}_prob": 0 for share in shares},
        **dict.fromkeys(scales, 0),
        "dropout_prob": 1,
        "sparsification_removal_percent": 0,
        "ray_dirs_encoder_config": {"name": "ray_dirs_encoder", "in_chans": 3, **dense},
        "depth_encoder_config": {"name": "depth_encoder", "in_chans": 1, **dense},
        "cam_rot_encoder_config": {"name": "cam_rot_quats_encoder", "in_chans": 4, **whole},
        "cam_trans_encoder_config": {"name": "cam_trans_encoder", "in_chans": 3, **whole},
        "scale_encoder_config": {"name": "scale_encoder", "in_chans": 1, **whole},
    }
