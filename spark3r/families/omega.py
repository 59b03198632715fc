"""VGGT-Omega: VGGT's successor, 24 pairs of blocks of which 19 attend globally.

Five inter-frame blocks attend over camera and register tokens only; they are left alone. A frame
has one camera token, sixteen registers and the patches. Frame 0 has camera and register tokens of
its own. Global attention has no rotary embedding. The bias of its projection is masked, so the
projection is always called and its weight is never sliced.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..layout import TokenLayout
from ..reduction.exchange import Exchange
from ..reduction.rule import ResolvedRule
from .base import Family, Replacement
from .parts import aggregator, omega_memory
from .parts.preprocessing import balanced
from .parts.query_key import normalise_and_rotate
from .parts.recognition import (
    attentions,
    has,
    is_fused_attention,
    locate,
    located,
    refuse_argument,
    refuse_dropout,
    unlike,
)
from .parts.reduced import reduced_attention
from .parts.sharded import (
    on_whole_clip,
    refuse_unlike,
    refused,
    special_of_last,
    special_tokens_attend,
)

_AGGREGATORS = ("aggregator", "")
_ARGUMENTS = ("x", "attn_bias", "rope")
_START = "patch_token_start"


def _alternates(module: Any) -> bool:
    """Return True if a module has inter-frame blocks of two types like VGGT-Omega's aggregator."""
    parts = ("frame_blocks", "inter_frame_blocks", "inter_frame_attention_types")
    return has(module, *parts, _START, "patch_size") and bool(_global(module))


def _global(entry: Any) -> dict[str, nn.Module]:
    """Return the global attention modules by their name inside the aggregator."""
    modules = attentions(entry.inter_frame_blocks)
    return {
        f"inter_frame_blocks.{i}.attn": attn
        for i, (attn, kind) in enumerate(
            zip(modules, entry.inter_frame_attention_types, strict=False)
        )
        if kind == "global"
    }


def _is_aggregator(module: Any) -> bool:
    return _alternates(module) and all(
        is_fused_attention(attn, _ARGUMENTS) for attn in _global(module).values()
    )


def _explain_mismatch(root: nn.Module) -> str | None:
    found = locate(root, _AGGREGATORS, _alternates)
    if found is None:
        return None
    return unlike(next(iter(_global(found[1]).values())), _ARGUMENTS, "VGGT-Omega")


def _aggregator(root: nn.Module) -> tuple[str, Any]:
    return located(root, _AGGREGATORS, _is_aggregator, "VGGT-Omega")


def _attention(root: nn.Module) -> dict[str, nn.Module]:
    path, entry = _aggregator(root)
    prefix = f"{path}." if path else ""
    return {prefix + name: attn for name, attn in _global(entry).items()}


def _reduced_forward(
    attn: Any,
    layout: TokenLayout,
    rule: ResolvedRule,
    x: Tensor,
    attn_bias: Tensor | None = None,
    rope: object = None,
) -> Tensor:
    refuse_argument(attn, "attn_bias", attn_bias)
    refuse_argument(attn, "rope", rope)
    refuse_dropout(attn)
    prepare = partial(normalise_and_rotate, attn, layout, rotary=False)
    return reduced_attention(attn, layout, rule, x, prepare)


def _memory_savers(root: nn.Module) -> Iterator[Replacement]:
    entry = _aggregator(root)[1]
    blocks, kinds = entry.inter_frame_blocks, entry.inter_frame_attention_types
    whole = [block for block, kind in zip(blocks, kinds, strict=False) if kind == "global"]
    return omega_memory.memory_savers(root, entry, whole)


def _unread(root: nn.Module) -> Iterator[Replacement]:
    if has(root, "aggregator", "dense_head", "text_alignment_head"):
        yield root, "text_alignment_head", None


def _sharding(root: Any, exchange: Exchange) -> Iterator[Replacement]:
    entry = _aggregator(root)[1]
    special = getattr(entry, _START)
    exchange.first_tokens += [(entry, name) for name in ("camera_token", "register_token")]
    whole = set(_global(entry).values())
    for attn in attentions(entry.inter_frame_blocks):
        if attn not in whole:
            yield from special_tokens_attend(attn, exchange, special, _reduced_forward)
    if root is entry:
        return
    camera, text = (getattr(root, name, None) for name in ("camera_head", "text_alignment_head"))
    if camera is not None:
        refuse_unlike(camera, omega_memory.VERSION.camera, "camera head")
        yield from on_whole_clip(camera, exchange, partial(special_of_last, exchange, special))
    if text is not None:
        yield from refused(text, exchange, "VGGT-Omega's text alignment reads all frames")


FAMILY = Family(
    name="omega",
    usage="model(images) or model.aggregator(images)",
    matches=lambda root: locate(root, _AGGREGATORS, _is_aggregator) is not None,
    explain_mismatch=_explain_mismatch,
    attention=_attention,
    entry=lambda root: _aggregator(root)[1],
    layout=partial(aggregator.layout, start=_START),
    reduced_forward=_reduced_forward,
    predict=aggregator.predict,
    preprocess=balanced,
    metadata=lambda root: aggregator.metadata(_aggregator(root)[1], start=_START),
    memory_savers=_memory_savers,
    prediction_savers=lambda root: omega_memory.prediction_savers(root, _aggregator(root)[1]),
    unread=_unread,
    sharding=_sharding,
)
