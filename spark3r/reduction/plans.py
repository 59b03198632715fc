"""Kept keys, merge plans and their lengths, for a rule and a token layout.

They depend on nothing but their arguments. They are cached, and a compiled graph holds them as
constants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from operator import index
from typing import Any

import torch
from torch import Tensor

from ..compiling import assume_constant_result
from ..errors import ScheduleError
from ..kernels.grouped_attention import OPERATION, Group
from ..kernels.trials import is_possible
from ..layout import TokenLayout
from . import diversity
from .merging import MergePlan
from .operators import KeyValuePruning, QueryMerging, TemporalStride
from .pruning import KeySelection, masked_tokens
from .rule import ResolvedRule
from .sharding import RankPool, ShardedLayout


def select(
    layout: TokenLayout,
    rule: ResolvedRule,
    device: torch.device,
    *,
    tokens: Tensor | None = None,
    by_group: bool | None = None,
) -> KeySelection | None:
    """Return the keys and values that stay under a rule, or None when all do.

    Of one rank's frames these are the ones that stay of the whole clip, in sequence order. Masked
    patches never stay.

    Args:
        layout: Token layout of the pass.
        rule: Rule of the layer.
        device: Device of the tokens, and of the selection's index.
        tokens: Hidden states or keys of all tokens ``[B, N, C]``, for operators that choose by
            content.
        by_group: Whether tokens of one bias stand side by side, as kernels without a mask need
            them; None means on CUDA, which has such kernels.

    Raises:
        ScheduleError: If the operator chooses by content, and there are no tokens.
    """
    if rule.key_value == 1 and layout.masked is None:
        return None
    grouped = is_possible(OPERATION, device) if by_group is None else by_group
    operator = rule.operators.key_value if rule.key_value > 1 else _ALL
    factor, values = index(rule.key_value), operator.values
    if isinstance(layout, ShardedLayout):
        shard, size = layout.shard, layout.tokens_per_frame
        own = (shard.frames.start * size, shard.frames.stop * size)
        kept = _build_own(shard.whole.fields, factor, type(operator), values, device, own)
        return KeySelection(len(kept), layout.frames, index=kept)
    fields = _seen_by(operator, layout).fields
    found = KeySelection(*_select(fields, factor, type(operator), values, device, grouped))
    if not operator.by_content:
        return found
    if tokens is None:
        raise ScheduleError(
            f"'{operator.name}' chooses by content, but the family gives select() no tokens="
        )
    found = found.of_frames(diversity.frames_by_slot(tokens, layout, factor), layout)
    return found if layout.masked is None else found.without(_masked_tokens(layout.fields, device))


def _seen_by(operator: KeyValuePruning, layout: TokenLayout) -> TokenLayout:
    """Return the layout of the slots, in the first of which the anchor is.

    It has no mask, because no one knows on the host which frame is in a slot.
    """
    if not operator.by_content:
        return layout
    return replace(layout, anchor_frame=None if layout.anchor_frame is None else 0, masked=None)


def plan(layout: TokenLayout, rule: ResolvedRule, device: torch.device) -> MergePlan | None:
    """Return the merge plan of a rule, or None when no query is merged.

    Args:
        layout: Token layout of the pass.
        rule: Rule of the layer.
        device: Device of the tokens, and of the plan's indices.
    """
    if rule.query == 1:
        return None
    operator = rule.operators.query
    fields = layout.unmasked.fields
    found = _plan(fields, index(rule.query), type(operator), operator.values, device)
    if not found.blocks:  # the anchor frame is the whole clip and takes no part
        return None
    if isinstance(layout, ShardedLayout):
        total = int(destinations(layout.shard.whole, rule).sum())
        return replace(found, pool=RankPool(total, layout.shard))
    return found


def key_value_length(layout: TokenLayout, rule: ResolvedRule) -> int:
    """Return the realised number of keys under a rule, without listing them."""
    if rule.key_value == 1 and layout.masked is None:
        return layout.tokens
    operator = rule.operators.key_value if rule.key_value > 1 else _ALL
    return operator.length(_seen_by(operator, layout), rule.key_value)


def query_length(layout: TokenLayout, rule: ResolvedRule) -> int:
    """Return the realised number of queries under a rule, without listing them."""
    if rule.query == 1:
        return layout.tokens
    return rule.operators.query.length(layout, rule.query)


def destinations(layout: TokenLayout, rule: ResolvedRule) -> Tensor:
    """Return the number of destinations in each frame of a clip, ``[S]`` int64 on the CPU.

    The rule merges queries.
    """
    operator = rule.operators.query
    make: Callable[..., QueryMerging] = type(operator)
    return _build_destinations(layout.fields, rule.query, make, operator.values)


_ALL = TemporalStride()
"""Keeps all patches at factor 1."""

_Fields = tuple[Any, ...]  # a layout's or an operator's
_Parts = tuple[  # of a KeySelection
    int, int, int | None, Tensor | None, Tensor | None, tuple[Group, ...]
]


# A traced graph takes only plain values and classes as constants. So a layout and an operator are
# taken apart before the call and put together again inside it.
@assume_constant_result
def _select(
    layout: _Fields,
    factor: int,
    make: type[KeyValuePruning],
    operator: _Fields,
    device: torch.device,
    by_group: bool,
) -> _Parts:
    return _build_selection(layout, factor, make, operator, device, by_group)


@assume_constant_result
def _masked_tokens(layout: _Fields, device: torch.device) -> Tensor:
    return _build_masked_tokens(layout, device)


@assume_constant_result
def _plan(
    layout: _Fields,
    factor: int,
    make: Callable[..., QueryMerging],
    operator: _Fields,
    device: torch.device,
) -> MergePlan:
    return _build_plan(layout, factor, make, operator, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # otherwise a later backward pass could not use the cached tensors
def _build_selection(
    layout: _Fields,
    factor: int,
    make: type[KeyValuePruning],
    operator: _Fields,
    device: torch.device,
    by_group: bool,
) -> _Parts:
    found = make(*operator).select(TokenLayout(*layout), factor)
    if make.by_content:
        found = found.indexed()
    if by_group:
        found = found.by_group()
    kept = None if found.index is None else found.index.to(device)
    exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    bias = None if found.logit_bias is None else found.logit_bias.to(device, exact)
    return found.length, found.frames, found.frame_stride, kept, bias, found.groups


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _build_plan(
    layout: _Fields,
    factor: int,
    make: Callable[..., QueryMerging],
    operator: _Fields,
    device: torch.device,
) -> MergePlan:
    return make(*operator).plan(TokenLayout(*layout), factor).to(device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _build_own(
    layout: _Fields,
    factor: int,
    make: Callable[..., KeyValuePruning],
    operator: _Fields,
    device: torch.device,
    own: tuple[int, int],
) -> Tensor:
    """Return which of the tokens from the first to before the second of ``own`` stay."""
    cpu = torch.device("cpu")
    found = KeySelection(*_build_selection(layout, factor, make, operator, cpu, False)).positions()
    start, stop = own
    return (found[(found >= start) & (found < stop)] - start).to(device)


@lru_cache(maxsize=64)
def _build_destinations(
    layout: _Fields, factor: int, make: Callable[..., QueryMerging], operator: _Fields
) -> Tensor:
    whole, merging = TokenLayout(*layout), make(*operator)
    size = min(merging.group, whole.frames)
    in_group = merging.destinations(size, whole.height, whole.width, factor).sum(dim=1)
    chosen = in_group[torch.arange(whole.frames, device="cpu") % size]
    if whole.anchor_frame is not None and not merging.merge_anchor:
        chosen[whole.anchor_frame] = 0
    return chosen


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _build_masked_tokens(layout: _Fields, device: torch.device) -> Tensor:
    return masked_tokens(TokenLayout(*layout)).to(device)
