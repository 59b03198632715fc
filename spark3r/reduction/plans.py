"""Kept keys, merge plans and their lengths: what a rule comes to on a token layout.

They depend on nothing but their arguments. They are cached, and constants of a compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from operator import index
from typing import Any

import torch
from torch import Tensor

from ..layout import TokenLayout
from .merging import MergePlan
from .operators import KeyValuePruning, QueryMerging
from .pruning import KeySelection
from .rule import ResolvedRule


def select(layout: TokenLayout, rule: ResolvedRule, device: torch.device) -> KeySelection | None:
    """Return the keys and values that stay under a rule, or None when all do.

    Args:
        layout: Token layout of the pass.
        rule: Rule of the layer.
        device: Device of the tokens, and of the selection's index.
    """
    if rule.key_value == 1:
        return None
    operator = rule.operators.key_value
    factor = index(rule.key_value)
    return KeySelection(*_select(layout.fields, factor, type(operator), operator.values, device))


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
    found = _plan(layout.fields, index(rule.query), type(operator), operator.values, device)
    return found if found.blocks else None  # only the anchor frame, and it stands aside


def key_value_length(layout: TokenLayout, rule: ResolvedRule) -> int:
    """Return the realised number of keys under a rule, without listing them."""
    if rule.key_value == 1:
        return layout.tokens
    return rule.operators.key_value.length(layout, rule.key_value)


def query_length(layout: TokenLayout, rule: ResolvedRule) -> int:
    """Return the realised number of queries under a rule, without listing them."""
    if rule.query == 1:
        return layout.tokens
    return rule.operators.query.length(layout, rule.query)


_Fields = tuple[Any, ...]  # a layout's or an operator's
_Parts = tuple[int, int, int | None, Tensor | None, Tensor | None]  # of a KeySelection


# Only plain values and classes enter and leave a traced graph as constants: a layout and an
# operator come apart and are put together again behind the border.
@torch.compiler.assume_constant_result
def _select(
    layout: _Fields,
    factor: int,
    make: Callable[..., KeyValuePruning],
    operator: _Fields,
    device: torch.device,
) -> _Parts:
    return _build_selection(layout, factor, make, operator, device)


@torch.compiler.assume_constant_result
def _plan(
    layout: _Fields,
    factor: int,
    make: Callable[..., QueryMerging],
    operator: _Fields,
    device: torch.device,
) -> MergePlan:
    return _build_plan(layout, factor, make, operator, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # or a later backward pass could not use what is cached
def _build_selection(
    layout: _Fields,
    factor: int,
    make: Callable[..., KeyValuePruning],
    operator: _Fields,
    device: torch.device,
) -> _Parts:
    found = make(*operator).select(TokenLayout(*layout), factor)
    kept = None if found.index is None else found.index.to(device)
    exact = torch.float32 if device.type == "mps" else torch.float64  # which MPS lacks
    mass = None if found.mass is None else found.mass.to(device, exact)
    return found.length, found.frames, found.frame_stride, kept, mass


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
