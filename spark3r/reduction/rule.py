"""The rule of one layer in one pass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..layout import TokenLayout
from .operators import KeyValuePruning, Operators, QueryMerging


@dataclass(frozen=True, eq=False)
class ResolvedRule:
    """The factors and operators of one global layer in a pass.

    Two rules are equal if they do the same: the operator of an axis with factor 1 does not count.

    Attributes:
        query: Reduction factor of the query patches, 1 for none.
        key_value: Reduction factor of the key and value frames or patches, 1 for none.
        operators: Operators of both axes.
    """

    query: int = 1
    key_value: int = 1
    operators: Operators = field(default_factory=Operators)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ResolvedRule):
            return NotImplemented
        return self._effect == other._effect

    def __hash__(self) -> int:
        return hash(self._effect)

    @property
    def is_dense(self) -> bool:
        """True if the layer is not reduced."""
        return self.query == 1 and self.key_value == 1

    def describe(self) -> str:
        """Return the rule in words, such as ``token stride, β 1; queries merged, copied back``.

        A dense rule is a dash.
        """
        keys = [self.operators.key_value.describe()] if self.key_value > 1 else []
        queries = [f"queries {self.operators.query.describe()}"] if self.query > 1 else []
        return "; ".join(keys + queries) or "–"

    @property
    def _effect(self) -> tuple[int, int, QueryMerging | None, KeyValuePruning | None]:
        merging = self.operators.query if self.query > 1 else None
        pruning = self.operators.key_value if self.key_value > 1 else None
        return self.query, self.key_value, merging, pruning


def clamp(rule: ResolvedRule, layout: TokenLayout) -> ResolvedRule:
    """Return the rule with factors no larger than a layout allows.

    Those leave about one query patch of each frame, and the fewest keys that the key-value operator
    can keep.
    """
    query = min(rule.query, layout.patches)
    key_value = min(rule.key_value, rule.operators.key_value.largest_factor(layout))
    if (query, key_value) == (rule.query, rule.key_value):
        return rule
    return replace(rule, query=query, key_value=key_value)
