"""Token reduction on plain tensors: prune keys and values, merge queries, attend, unmerge."""

from __future__ import annotations

from .attention import attend, attention_share
from .merging import query_length
from .pruning import KeySelection, key_value_length, select
from .resolve import clamp, resolve

__all__ = [
    "KeySelection",
    "attend",
    "attention_share",
    "clamp",
    "key_value_length",
    "query_length",
    "resolve",
    "select",
]
