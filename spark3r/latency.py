"""The latency model: milliseconds of any schedule from realised lengths.

A pass takes ``rest + Σ over global layers of Σ terms``. The terms of a layer follow from the
arithmetic of reduced attention, with N tokens in the clip, n remaining queries and m remaining
keys:

=============  ==========  =================================================================
term           unit        where the time goes
=============  ==========  =================================================================
``attention``  10⁶ n·m     the two attention products
``queries``    10³ n       their rows of the softmax, reading and writing
``keys``       10³ m       projection, norm and rotary embedding of keys and values
``masked``     10⁶ n·m     what mass correction adds: its bias, and the kernel that takes one
``gathered``   10³ m       keys and values taken by index and not by stride
``merged``     10³ N       gathering, averaging and copying back, where queries are merged
``moved``      10³ N       fitting and applying the map of linear unmerging
``matched``    10⁶ pairs   comparing sources with destinations inside the groups
=============  ==========  =================================================================

``rest`` holds everything else: frame attention, heads, and the parts of the global layers that
always run. It is the wall. All constants are non-negative, so that more work is never predicted to
take less time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .layout import TokenLayout
from .reduction.plans import key_value_length, plan, query_length, select
from .reduction.rule import ResolvedRule, clamp
from .schedule import Schedule

TERMS = ("attention", "queries", "keys", "masked", "gathered", "merged", "moved", "matched")

MOST_GAIN = 3.0
"""Largest factor by which one schedule corrects the terms."""

FORM = "separable-2"
"""Name of this formula in profiles."""


@dataclass(frozen=True)
class LatencyModel:
    """Latency of any schedule on one model, device, dtype and patch grid.

    Attributes:
        frames: Length of the clips that it was fitted to. At another length ``rest`` is assumed to
            be proportional to the length.
        rest_ms: Latency of everything outside the terms, per clip.
        term_ms: Milliseconds per unit of each term.
    """

    frames: int
    rest_ms: float
    term_ms: Mapping[str, float]

    def layer_ms(self, rule: ResolvedRule, layout: TokenLayout) -> float:
        """Return the latency of a layer beyond the wall."""
        amounts = terms(clamp(rule, layout), layout)
        return sum(self.term_ms[name] * amount for name, amount in zip(TERMS, amounts, strict=True))

    def wall_ms(self, layout: TokenLayout) -> float:
        """Return the latency of a clip when global attention returns zeros."""
        return self.rest_ms * layout.frames / self.frames

    def predict_ms(self, schedule: Schedule, layout: TokenLayout) -> float:
        """Return the latency of a clip under a schedule."""
        rules = schedule.resolve(layout.frames)
        return self.wall_ms(layout) + math.fsum(self.layer_ms(rule, layout) for rule in rules)

    def with_wall(self, layout: TokenLayout, wall_ms: float) -> LatencyModel:
        """Return the model with a wall that was measured at a layout."""
        rest_ms = wall_ms * self.frames / layout.frames
        return LatencyModel(self.frames, rest_ms, self.term_ms)

    def scaled(self, by: float) -> LatencyModel:
        """Return the model of a machine that takes ``by`` times as long."""
        return LatencyModel(
            self.frames, by * self.rest_ms, {name: by * ms for name, ms in self.term_ms.items()}
        )

    def corrected(
        self, layout: TokenLayout, wall_ms: float, predicted_ms: float, measured_ms: float
    ) -> LatencyModel:
        """Return the model with another wall, and terms scaled to be right about one schedule.

        Args:
            layout: Token layout of the clip.
            wall_ms: The wall, measured.
            predicted_ms: Latency of the schedule as this model predicts it.
            measured_ms: Latency of the schedule, measured beside the wall.
        """
        work_ms = predicted_ms - self.wall_ms(layout)
        gain = (measured_ms - wall_ms) / work_ms if work_ms > 0 else 1.0
        gain = min(max(gain, 1 / MOST_GAIN), MOST_GAIN)  # a schedule at the wall tells nothing
        terms = {name: gain * each for name, each in self.term_ms.items()}
        return replace(self.with_wall(layout, wall_ms), term_ms=terms)

    def to_dict(self) -> dict[str, float]:
        """Return the constants by name, in the form that a profile stores."""
        constants = {f"{name}_ms": self.term_ms[name] for name in TERMS}
        return {"frames": float(self.frames), "rest_ms": self.rest_ms, **constants}

    @classmethod
    def from_dict(cls, constants: Mapping[str, float]) -> LatencyModel:
        """Return the model that `to_dict` wrote.

        Raises:
            ValueError: If a constant is missing, unknown or out of range.
        """
        expected = {"frames", "rest_ms", *(f"{name}_ms" for name in TERMS)}
        if constants.keys() != expected:
            raise ValueError(
                f"latency model of the form '{FORM}' with {sorted(constants)}, expected the "
                f"constants {sorted(expected)}"
            )
        low = sorted(name for name, value in constants.items() if value < (name == "frames"))
        if low:
            raise ValueError(f"latency model with {low[0]} {constants[low[0]]:g}")
        term_ms = {name: constants[f"{name}_ms"] for name in TERMS}
        return cls(int(constants["frames"]), constants["rest_ms"], term_ms)


@lru_cache(maxsize=4096)
def terms(rule: ResolvedRule, layout: TokenLayout) -> tuple[float, ...]:
    """Return the amounts of a layer's `TERMS`, each in its unit, under a rule within the layout."""
    cpu = torch.device("cpu")
    queries, keys = query_length(layout, rule), key_value_length(layout, rule)
    selection, merge_plan = select(layout, rule, cpu), plan(layout, rule, cpu)
    products = queries * keys / 1e6
    has_bias = selection is not None and selection.logit_bias is not None
    by_index = selection is not None and selection.index is not None
    merged = 0.0 if merge_plan is None else layout.tokens / 1e3
    pairs = 0
    if merge_plan is not None:
        pairs = sum(
            block.groups * block.destinations * block.sources for block in merge_plan.blocks
        )
    return (
        products,
        queries / 1e3,
        keys / 1e3,
        products * has_bias,
        keys / 1e3 * by_index,
        merged,
        merged * rule.operators.query.unmerging.fits_map,
        pairs / 1e6,
    )
