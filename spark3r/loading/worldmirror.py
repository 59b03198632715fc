"""WorldMirror's architecture: versions 2 and 1, both by the code of version 2.

Upstream imports gsplat and flash-attn when its modules are imported. A prediction needs no splats,
and where flash-attn is missing, torch's attention takes the place of its function.
"""

from __future__ import annotations

import contextlib
import io
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "hyworld2.worldrecon.hyworldmirror"
VARIANTS = ("2", "1")


def variant(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the variant of a checkpoint's tensors, None if they fit none."""
    if "visual_geometry_transformer.global_blocks.0.attn.qkv.weight" not in tensors:
        return None
    return "2" if any(name.endswith("rope.periods") for name in tensors) else "1"


def build(variant: str, module: Callable[[str], Any]) -> nn.Module:
    """Return a variant with random weights; ``module`` imports modules of upstream's code."""
    made: nn.Module
    newer = variant != "1"
    # Upstream prints its sizes.
    with without_kernels(), contextlib.redirect_stdout(io.StringIO()):
        made = module(f"{PACKAGE}.models.models.worldmirror").WorldMirror(
            enable_pts=False,
            enable_norm=False,
            enable_gs=False,
            enable_depth_mask=newer,
            normalized_rope=newer,
        )
    return made


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Return a context in which upstream's code is imported where gsplat or flash-attn is missing.

    What is there is used.
    """
    absent: dict[str, Any] = {}
    if find_spec("gsplat") is None:
        absent["gsplat.rendering"] = {"rasterization": None}
        absent["gsplat.strategy"] = {"DefaultStrategy": None}
    if find_spec("flash_attn") is None and find_spec("flash_attn_interface") is None:
        absent["flash_attn.flash_attn_interface"] = {"flash_attn_func": _attention}
    made: dict[str, types.ModuleType] = {}
    for name, content in absent.items():
        package = types.ModuleType(name.partition(".")[0])
        package.__path__ = []
        made |= {package.__name__: package, name: types.ModuleType(name)}
        made[name].__dict__.update(content)
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            sys.modules.pop(name, None)


def _attention(query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Return attention as flash-attn's function does, of ``[B, N, H, D]``."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p)
    return output.transpose(1, 2)
