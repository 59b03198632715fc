"""Token reduction on plain tensors: thin keys and values, merge queries, attend, unmerge."""

from __future__ import annotations

from dataclasses import replace

from ..layout import TokenLayout
from ..schedule import LayerRule
from .attention import attend, attention_share
from .merge import query_length
from .prune import KeySelection, key_value_length, select

__all__ = [
    "KeySelection",
    "attend",
    "attention_share",
    "clamp",
    "key_value_length",
    "query_length",
    "select",
]


def clamp(rule: LayerRule, layout: TokenLayout) -> LayerRule:
    """Return the resolved rule with its factors brought down to what the layout allows.

    A query group has at least one destination, ``temporal_stride`` keeps at least frame 0, and
    ``token_stride`` keeps at least one patch.
    """
    assert rule.operators is not None, "resolve the schedule first"
    patches = layout.patches
    most_query = min(rule.operators.group, layout.frames) * patches
    most_key_value = layout.frames
    if rule.operators.key_value == "token_stride":
        most_key_value *= patches
    if rule.query <= most_query and rule.key_value <= most_key_value:
        return rule
    return replace(
        rule,
        query=min(rule.query, most_query),
        key_value=min(rule.key_value, most_key_value),
    )
