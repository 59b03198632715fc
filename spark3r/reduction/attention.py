"""Attention of merged queries to the kept keys and values (Spark3R fig. 3)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ScheduleError
from ..kernels import grouped_attention
from ..layout import TokenLayout
from . import merging
from .plans import key_value_length, plan, query_length
from .pruning import KeySelection
from .rule import ResolvedRule
from .steps import step


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    rule: ResolvedRule,
    selection: KeySelection | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Return reduced attention: merge the queries, attend to the keys and values, unmerge.

    Args:
        query: Queries of all N tokens, ``[B, H, N, D]``, after query norm and rotary embedding.
        key: Keys of the M kept tokens, ``[B, H, M, D]``, after key norm and rotary embedding.
        value: Values of the kept tokens, ``[B, H, M, D]``.
        layout: Token layout of the N tokens.
        rule: Rule of the layer in this pass.
        selection: Selection of the kept tokens, None if all N are kept.
        scale: Factor on the logits; None takes 1/sqrt(D).

    Returns:
        ``[B, H, N, D]`` in the queries' dtype. With a query factor of 1 and no selection it equals
        ``F.scaled_dot_product_attention(query, key, value)``, bit for bit.
    """
    merge_plan = plan(layout, rule, query.device)
    if merge_plan is None:
        return attend_to_selected(query, key, value, selection, scale)
    operator = rule.operators.query
    places = step("matching", merging.match, query, merge_plan, operator.features)
    merged = step("merging", merging.merge, query, places, merge_plan.kept.shape[0])
    output = attend_to_selected(merged, key, value, selection, scale)
    unmerge = operator.unmerging.unmerge
    return step("unmerging", unmerge, query, merged, output, places, merge_plan)


def attend_to_selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: KeySelection | None,
    scale: float | None = None,
) -> Tensor:
    """Return attention of some queries to the selected keys, with mass correction.

    Arguments are those of `attend`, and the queries are taken as they are.
    """
    if selection is None or selection.logit_bias is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if selection.groups and not recorded:
        kernel = grouped_attention.implementation(value.device, value.dtype, value.shape[-1])
        if kernel != grouped_attention.MASK:
            # Autocast does not reach the kernels' private operators.
            query, key = query.to(value.dtype), key.to(value.dtype)
            by_group = grouped_attention.attend
            return step("attention", by_group, query, key, value, selection.groups, kernel, scale)
    bias = selection.logit_bias.to(query.dtype)
    return grouped_attention.masked(query, key, value, bias, scale)


def attention_share(rules: Iterable[ResolvedRule], layout: TokenLayout) -> float:
    """Return the share of the dense attention cost that rules leave, as a fraction.

    It is the mean over layers of realised queries times realised keys over N²: the work of the
    attention products. Matching and projections are not counted.

    Args:
        rules: Rule of each layer.
        layout: Token layout of the pass.

    Raises:
        ScheduleError: If there are no rules.
    """
    dense = layout.tokens**2
    rules = tuple(rules)
    if not rules:
        raise ScheduleError("the share of no layers is not defined: pass at least one rule")
    shares = [query_length(layout, rule) * key_value_length(layout, rule) / dense for rule in rules]
    return sum(shares) / len(shares)
