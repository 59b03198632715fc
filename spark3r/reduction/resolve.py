"""Bring a schedule down to one pass: its length, and what its layout allows."""

from __future__ import annotations

from dataclasses import replace

from ..layout import TokenLayout
from ..schedule import LayerRule, Schedule


def resolve(schedule: Schedule, layout: TokenLayout) -> tuple[LayerRule, ...]:
    """Return the rules of a pass: resolved for its length, within what its layout allows."""
    return tuple(clamp(rule, layout) for rule in schedule.resolve(layout.frames))


def clamp(rule: LayerRule, layout: TokenLayout) -> LayerRule:
    """Return the resolved rule with its factors brought down to what the layout allows.

    ``temporal_stride`` keeps at least frame 0; what works inside frames keeps about one patch of
    each.
    """
    assert rule.operators is not None, "resolve the schedule first"
    stride = rule.operators.key_value == "temporal_stride"
    most_key_value = layout.frames if stride else layout.patches
    if rule.query <= layout.patches and rule.key_value <= most_key_value:
        return rule
    return replace(
        rule,
        query=min(rule.query, layout.patches),
        key_value=min(rule.key_value, most_key_value),
    )
