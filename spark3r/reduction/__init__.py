"""Token reduction: operators, and their functions on plain tensors.

Names are resolved on first use, because schedules are read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import attend as attend
    from .attention import attention_share as attention_share
    from .operators import DiverseFrames as DiverseFrames
    from .operators import KeyValuePruning as KeyValuePruning
    from .operators import Operators as Operators
    from .operators import QueryMerging as QueryMerging
    from .operators import TemporalStride as TemporalStride
    from .operators import TokenStride as TokenStride
    from .plans import key_value_length as key_value_length
    from .plans import query_length as query_length
    from .plans import select as select
    from .pruning import KeySelection as KeySelection
    from .rule import ResolvedRule as ResolvedRule
    from .rule import clamp as clamp

_HOMES = {
    "attention": ("attend", "attention_share"),
    "operators": (
        "DiverseFrames",
        "KeyValuePruning",
        "Operators",
        "QueryMerging",
        "TemporalStride",
        "TokenStride",
    ),
    "plans": ("key_value_length", "query_length", "select"),
    "pruning": ("KeySelection",),
    "rule": ("ResolvedRule", "clamp"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "DiverseFrames",
    "KeySelection",
    "KeyValuePruning",
    "Operators",
    "QueryMerging",
    "ResolvedRule",
    "TemporalStride",
    "TokenStride",
    "attend",
    "attention_share",
    "clamp",
    "key_value_length",
    "query_length",
    "select",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
