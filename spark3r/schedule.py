"""Schedules: the reduction factors of every global attention layer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from .checks import integer, require_choice
from .errors import ScheduleError
from .layout import TokenLayout
from .reduction.operators import Operators
from .reduction.rule import ResolvedRule, clamp

LengthMode = Literal["constant", "constant_kept_frames", "paper"]
LENGTH_MODES: tuple[LengthMode, ...] = ("constant", "constant_kept_frames", "paper")

PAPER_TIER = 3
"""Key-value multiplier l of the layers that are not sensitive, Spark3R §IV-D."""

PAPER_MIN_FRAMES = 8
"""Clips of fewer frames run dense under the paper's schedule. By arithmetic, 7 frames of VGGT at
518x392 would gain 1.13 times. A pair of frames, as for a loop closure, would lose half its keys."""

PAPER_SENSITIVE_LAYERS: Mapping[tuple[str, int], tuple[int, ...]] = MappingProxyType(
    {
        ("vggt", 24): tuple(range(11, 17)),
        ("pi3", 18): tuple(range(11, 17)),
        ("da3", 14): tuple(range(3, 13)),  # DA3-Giant
        ("omega", 19): (*range(7, 14), 16),  # the paper counts blocks, this counts global layers
    }
)
"""Sensitive layers of Spark3R §IV-D by (family, number of global layers), counted from 0."""


@dataclass(frozen=True)
class LayerRule:
    """The reduction factors of one global layer.

    Attributes:
        query: Nominal reduction of the query patches, an integer of at least 1.
        key_value: Nominal reduction of the key and value frames or patches, an integer of at
            least 1.
        operators: Operators of this layer alone; None takes the schedule's.

    Raises:
        ScheduleError: If a factor is below 1 or not an integer.
    """

    query: int = 1
    key_value: int = 1
    operators: Operators | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "query", integer(self.query, "query factor"))
        object.__setattr__(self, "key_value", integer(self.key_value, "key-value factor"))
        if self.operators is not None and not isinstance(self.operators, Operators):
            raise ScheduleError(f"operators are {self.operators!r}, expected Operators or None")

    @property
    def is_dense(self) -> bool:
        """True if the layer is not reduced."""
        return self.query == 1 and self.key_value == 1

    def resolve(self, operators: Operators) -> ResolvedRule:
        """Return the rule of a pass with the factors as they are.

        Args:
            operators: Operators of the schedule, for a layer that has none of its own.
        """
        own = operators if self.operators is None else self.operators
        return ResolvedRule(self.query, self.key_value, own)


@dataclass(frozen=True)
class LengthRule:
    """The way in which a schedule's factors follow the length of a clip.

    Attributes:
        mode: Name of the rule. ``constant`` leaves the factors as they are.
            ``constant_kept_frames`` lets key-value factors grow with the clip, so that as many
            frames are kept as at ``calibrated_frames``. ``paper`` multiplies the factors by the
            length rule of Spark3R (eq. 4 and 5).
        calibrated_frames: Length in frames that the factors were chosen for, or None.
        min_frames: Length in frames below which a clip runs dense.
        max_frames: Longest clip in frames with evidence, or None for no bound. A longer clip runs,
            with one warning.

    Raises:
        ScheduleError: If a bound is out of range or missing.
    """

    mode: LengthMode = "constant"
    calibrated_frames: int | None = None
    min_frames: int = 1
    max_frames: int | None = None

    def __post_init__(self) -> None:
        require_choice(self.mode, "length mode", LENGTH_MODES)
        integer(self.min_frames, "min_frames")
        if self.calibrated_frames is not None:
            integer(self.calibrated_frames, "calibrated_frames")
        elif self.mode == "constant_kept_frames":
            raise ScheduleError("length mode 'constant_kept_frames' needs calibrated_frames")
        if self.max_frames is not None:
            integer(self.max_frames, "max_frames", minimum=self.min_frames)


@dataclass(frozen=True)
class Schedule:
    """One layer rule per global attention layer, the operators, and the length rule.

    Attributes:
        layers: Layer rules in the order in which a pass calls the layers.
        operators: Operators of every layer that has none of its own.
        length: Length rule of the factors.

    Raises:
        ScheduleError: If there is no layer.
    """

    layers: tuple[LayerRule, ...]
    operators: Operators = field(default_factory=Operators)
    length: LengthRule = field(default_factory=LengthRule)

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Iterable):
            raise ScheduleError(f"layers are {self.layers!r}, expected one LayerRule per layer")
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ScheduleError("a schedule needs at least one layer rule, got none")
        for name, kind in (("operators", Operators), ("length", LengthRule)):
            if not isinstance(getattr(self, name), kind):
                raise ScheduleError(
                    f"{name} is {getattr(self, name)!r}, expected {kind.__name__}(...)"
                )
        for place, rule in enumerate(self.layers):
            if not isinstance(rule, LayerRule):
                raise ScheduleError(f"layers[{place}] is {rule!r}, expected a LayerRule")

    @classmethod
    def uniform(
        cls,
        layers: int,
        query: int = 1,
        key_value: int = 1,
        *,
        operators: Operators | None = None,
        length: LengthRule | None = None,
    ) -> Schedule:
        """Return a schedule with the same two factors in each of ``layers`` global layers."""
        integer(layers, "number of layers")
        rule = LayerRule(query, key_value)
        return cls((rule,) * layers, operators or Operators(), length or LengthRule())

    @classmethod
    def dense(cls, layers: int) -> Schedule:
        """Return the schedule that reduces none of ``layers`` global layers."""
        return cls.uniform(layers)

    def resolve(self, frames: int) -> tuple[ResolvedRule, ...]:
        """Return the rules of a clip of ``frames`` frames, with factors by the length rule.

        Raises:
            ScheduleError: If ``frames`` is not an integer of at least 1.
        """
        frames = integer(frames, "number of frames")
        return tuple(self._at_length(rule, frames) for rule in self.layers)

    def resolve_within(self, layout: TokenLayout) -> tuple[ResolvedRule, ...]:
        """Return the rules of a pass, with factors no larger than its layout allows."""
        return tuple(clamp(rule, layout) for rule in self.resolve(layout.frames))

    def _at_length(self, rule: LayerRule, frames: int) -> ResolvedRule:
        query, key_value = rule.query, rule.key_value
        if frames < self.length.min_frames:
            query = key_value = 1
        elif self.length.mode == "paper":
            query *= paper_query_factor(frames)
            key_value *= paper_key_value_factor(frames)
        elif self.length.mode == "constant_kept_frames" and self.length.calibrated_frames:
            calibrated = self.length.calibrated_frames
            key_value = max(1, (2 * key_value * frames + calibrated) // (2 * calibrated))
        return LayerRule(query, key_value, rule.operators).resolve(self.operators)


def paper_query_factor(frames: int) -> int:
    """Return r_Q of Spark3R eq. 4: 1, 2, 3, 4 up to 100, 300, 500 and more frames."""
    return 1 + sum(frames > bound for bound in (100, 300, 500))


def paper_key_value_factor(frames: int) -> int:
    """Return r_KV of Spark3R eq. 5: 1 up to 100 frames, then ⌈frames / 40⌉."""
    return 1 if frames <= 100 else math.ceil(frames / 40)


def paper_schedule(
    family: str,
    layers: int | None = None,
    *,
    sensitive: Iterable[int] | None = None,
) -> Schedule:
    """Return the schedule of the Spark3R paper (arXiv 2605.06270 v2, §IV, eq. 4 and 5).

    Sensitive layers have the key-value factor r_KV of eq. 5, all others have three times that
    factor. Every layer has the query factor r_Q of eq. 4. Clips of fewer than `PAPER_MIN_FRAMES`
    run dense, of which the paper says nothing.

    Args:
        family: Name of the model family.
        layers: Number of global layers; None takes that of the paper's model of the family.
        sensitive: Sensitive layers, counted from 0 among the global layers. They are needed for a
            model that the paper does not cover; the paper's probe finds them.

    Raises:
        ScheduleError: If the paper does not name the sensitive layers of this model and none are
            given, or if one lies outside the model.
    """
    if layers is None:
        known = [count for name, count in PAPER_SENSITIVE_LAYERS if name == family]
        if not known:
            families = ", ".join(name for name, _ in PAPER_SENSITIVE_LAYERS)
            raise ScheduleError(
                f"the paper has no model of family '{family}' (it has {families}): "
                "pass layers= and sensitive="
            )
        (layers,) = known
    integer(layers, "number of layers")
    if sensitive is None:
        if (family, layers) not in PAPER_SENSITIVE_LAYERS:
            covered = ", ".join(f"{name} with {n}" for name, n in PAPER_SENSITIVE_LAYERS)
            raise ScheduleError(
                f"the paper names no sensitive layers for '{family}' with {layers} global layers "
                f"(it covers {covered}): pass sensitive=, as its probe finds them"
            )
        sensitive = PAPER_SENSITIVE_LAYERS[family, layers]
    if not isinstance(sensitive, Iterable):
        raise ScheduleError(f"sensitive is {sensitive!r}, expected layer numbers")
    chosen = {integer(layer, "sensitive layer", minimum=0) for layer in sensitive}
    outside = sorted(layer for layer in chosen if layer >= layers)
    if outside:
        raise ScheduleError(f"sensitive layers {outside} lie outside the {layers} global layers")
    return Schedule(
        tuple(LayerRule(1, 1 if layer in chosen else PAPER_TIER) for layer in range(layers)),
        length=LengthRule(mode="paper", min_frames=PAPER_MIN_FRAMES),
    )


def operators_text(operators: Operators) -> str:
    """Return operators as text, as tables hold them: JSON with sorted keys."""
    return json.dumps(operators.to_dict(), sort_keys=True)
