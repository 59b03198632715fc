"""Schedules: how much every global attention layer reduces its queries, keys and values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from operator import index
from types import MappingProxyType
from typing import Any, Literal

from .errors import ScheduleError

QueryOperator = Literal["intra_group"]
KeyValueOperator = Literal["temporal_stride", "token_stride"]
Unmerging = Literal["copy", "linear"]
LengthMode = Literal["constant", "constant_kept_frames", "paper"]

QUERY_OPERATORS: tuple[QueryOperator, ...] = ("intra_group",)
KEY_VALUE_OPERATORS: tuple[KeyValueOperator, ...] = ("temporal_stride", "token_stride")
UNMERGINGS: tuple[Unmerging, ...] = ("copy", "linear")
LENGTH_MODES: tuple[LengthMode, ...] = ("constant", "constant_kept_frames", "paper")

OPERATORS_REVISION = 3
"""Raised whenever an operator's result changes, so that a profile's evidence can be told apart."""

PAPER_GROUP = 20
"""Frames per query-merging group, G in Spark3R §IV-B."""

PAPER_TIER = 3
"""Key-value multiplier l of the layers that are not sensitive, Spark3R §IV-D."""

PAPER_SENSITIVE_LAYERS: Mapping[tuple[str, int], tuple[int, ...]] = MappingProxyType(
    {
        ("vggt", 24): tuple(range(11, 17)),
        ("pi3", 18): tuple(range(11, 17)),
        ("da3", 14): tuple(range(3, 13)),  # DA3-Giant
        ("omega", 19): (*range(7, 14), 16),  # the paper counts blocks, this counts global layers
    }
)
"""Sensitive layers of Spark3R §IV-D by (family, number of global layers), counted from 0."""


def _integer(value: Any, name: str, minimum: int = 1) -> int:
    """Return ``value`` as an int; NumPy's integers count, booleans and 4.0 do not."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < minimum:
        raise ScheduleError(f"{name} is {value!r}, expected an integer of at least {minimum}")
    return index(value)


def _require_choice(value: object, name: str, choices: Iterable[str]) -> None:
    if value not in tuple(choices):
        raise ScheduleError(f"{name} is {value!r}, expected one of: {', '.join(choices)}")


@dataclass(frozen=True)
class Operators:
    """How queries are merged and how keys and values are thinned.

    The defaults are the paper's. Special tokens are never merged.

    Attributes:
        query: ``intra_group``: bipartite matching inside groups of consecutive frames.
        group: Frames per group, G.
        merge_anchor: Whether the anchor frame's patches take part in query merging.
        unmerge: ``copy``: merged tokens share one output. ``linear``: each is moved from it by a
            linear map of what its query differs by, fitted in the pass to the merged queries and
            their outputs.
        key_value: ``temporal_stride`` keeps every r-th frame, ``token_stride`` every r-th patch
            of each frame, at a phase that moves from frame to frame.
        keep_special: Whether the special tokens of every frame stay among keys and values; else
            those of every r-th frame do.
        keep_anchor: Whether the whole anchor frame stays among keys and values.
        mass_correction: Strength β in [0, 1] of the bias β·log(tokens stood for / tokens kept) on
            the keys of thinned patches, and likewise of thinned special tokens; 0 is off, 1
            restores their share of the softmax.

    Raises:
        ScheduleError: If a value is out of range.
    """

    query: QueryOperator = "intra_group"
    group: int = PAPER_GROUP
    merge_anchor: bool = True
    unmerge: Unmerging = "copy"
    key_value: KeyValueOperator = "temporal_stride"
    keep_special: bool = False
    keep_anchor: bool = False
    mass_correction: float = 0.0

    def __post_init__(self) -> None:
        _require_choice(self.query, "query operator", QUERY_OPERATORS)
        _require_choice(self.unmerge, "unmerge", UNMERGINGS)
        _require_choice(self.key_value, "key-value operator", KEY_VALUE_OPERATORS)
        _integer(self.group, "group")
        for name in ("merge_anchor", "keep_special", "keep_anchor"):
            if not isinstance(getattr(self, name), bool):
                raise ScheduleError(f"{name} is {getattr(self, name)!r}, expected true or false")
        beta = self.mass_correction
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta <= 1:
            raise ScheduleError(f"mass_correction is {beta!r}, expected a number from 0 to 1")


@dataclass(frozen=True)
class LayerRule:
    """The reduction factors of one global layer.

    Attributes:
        query: Nominal reduction of the query patches, an integer of at least 1.
        key_value: Nominal reduction of the key and value frames or patches, likewise.
        operators: The layer's own operators, or None for the schedule's.

    Raises:
        ScheduleError: If a factor is below 1 or not an integer.
    """

    query: int = 1
    key_value: int = 1
    operators: Operators | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "query", _integer(self.query, "query factor"))
        object.__setattr__(self, "key_value", _integer(self.key_value, "key-value factor"))
        if self.operators is not None and not isinstance(self.operators, Operators):
            raise ScheduleError(f"operators are {self.operators!r}, expected Operators or None")

    @property
    def is_dense(self) -> bool:
        """Whether the layer is left alone."""
        return self.query == 1 and self.key_value == 1

    def effect(self, operators: Operators) -> tuple[tuple[object, ...] | None, ...]:
        """Return what of the rule makes a difference: operators of an axis left alone do not.

        Args:
            operators: The schedule's, for a layer without its own.
        """
        each = self.operators or operators
        query = (self.query, each.query, each.group, each.merge_anchor, each.unmerge)
        key_value = (
            *(self.key_value, each.key_value),
            *(each.keep_special, each.keep_anchor, each.mass_correction),
        )
        return (query if self.query > 1 else None, key_value if self.key_value > 1 else None)


@dataclass(frozen=True)
class LengthRule:
    """How a schedule's factors follow the length of a clip.

    Attributes:
        mode: ``constant``: the factors as they are. ``constant_kept_frames``: key-value factors
            grow with the clip so that as many frames are kept as at ``calibrated_frames``.
            ``paper``: the factors multiply the length rule of Spark3R (eq. 4 and 5).
        calibrated_frames: The length the factors were chosen for.
        min_frames: Shorter clips run dense.
        max_frames: The longest clip there is evidence for; longer ones run, with one warning.

    Raises:
        ScheduleError: If a bound is out of range or missing.
    """

    mode: LengthMode = "constant"
    calibrated_frames: int | None = None
    min_frames: int = 1
    max_frames: int | None = None

    def __post_init__(self) -> None:
        _require_choice(self.mode, "length mode", LENGTH_MODES)
        _integer(self.min_frames, "min_frames")
        if self.calibrated_frames is not None:
            _integer(self.calibrated_frames, "calibrated_frames")
        elif self.mode == "constant_kept_frames":
            raise ScheduleError("length mode 'constant_kept_frames' needs calibrated_frames")
        if self.max_frames is not None:
            _integer(self.max_frames, "max_frames", minimum=self.min_frames)


@dataclass(frozen=True)
class Schedule:
    """One layer rule per global attention layer, the operators, and the length rule.

    Attributes:
        layers: Layer rules in the order in which a pass meets the layers.
        operators: Operators of every layer that has none of its own.
        length: How the factors follow the clip's length.

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
        _integer(layers, "number of layers")
        rule = LayerRule(query, key_value)
        return cls((rule,) * layers, operators or Operators(), length or LengthRule())

    @classmethod
    def dense(cls, layers: int) -> Schedule:
        """Return the schedule that leaves all of ``layers`` global layers alone."""
        return cls.uniform(layers)

    def resolve(self, frames: int) -> tuple[LayerRule, ...]:
        """Return the layer rules of a clip of ``frames`` frames, each with its operators.

        Raises:
            ScheduleError: If ``frames`` is not an integer of at least 1.
        """
        frames = _integer(frames, "number of frames")
        return tuple(
            replace(
                self._at_length(rule, frames),
                operators=self.operators if rule.operators is None else rule.operators,
            )
            for rule in self.layers
        )

    def _at_length(self, rule: LayerRule, frames: int) -> LayerRule:
        if frames < self.length.min_frames:
            return LayerRule()
        if self.length.mode == "paper":
            return LayerRule(
                rule.query * paper_query_factor(frames),
                rule.key_value * paper_key_value_factor(frames),
            )
        if self.length.mode == "constant_kept_frames" and self.length.calibrated_frames:
            calibrated = self.length.calibrated_frames
            scaled = (2 * rule.key_value * frames + calibrated) // (2 * calibrated)
            return LayerRule(rule.query, max(1, scaled))
        return LayerRule(rule.query, rule.key_value)


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

    Sensitive layers take r_KV of eq. 5, the others three times as much; queries take r_Q of
    eq. 4 everywhere.

    Args:
        family: Name of the model family.
        layers: Number of global layers; None takes the paper's model of that family.
        sensitive: Sensitive layers, counted from 0 among the global layers. Needed for models
            the paper does not cover; its probe finds them.

    Raises:
        ScheduleError: If the paper does not name this model's sensitive layers and none are
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
    _integer(layers, "number of layers")
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
    chosen = {_integer(layer, "sensitive layer", minimum=0) for layer in sensitive}
    outside = sorted(layer for layer in chosen if layer >= layers)
    if outside:
        raise ScheduleError(f"sensitive layers {outside} lie outside the {layers} global layers")
    return Schedule(
        tuple(LayerRule(1, 1 if layer in chosen else PAPER_TIER) for layer in range(layers)),
        length=LengthRule(mode="paper"),
    )


def operators_text(operators: Operators) -> str:
    """Return operators as tables hold them: JSON with sorted keys."""
    return json.dumps(asdict(operators), sort_keys=True)


def operators_name(operators: Operators) -> str:
    """Return what people call operators, such as ``token stride + anchor, β 1, linear``."""
    name = key_value_name(operators)
    return name + (", linear" if operators.unmerge == "linear" else "")


def query_name(operators: Operators) -> str:
    """Return what is done to queries: ``merged, linear unmerging``."""
    return "merged, " + ("linear unmerging" if operators.unmerge == "linear" else "copied back")


def key_value_name(operators: Operators) -> str:
    """Return what is done to keys and values, such as ``token stride + anchor, β 1``."""
    name = operators.key_value.replace("_", " ") + " + anchor" * operators.keep_anchor
    return name + (f", β {operators.mass_correction:g}" if operators.mass_correction else "")


def rule_name(rule: LayerRule) -> str:
    """Return what a resolved rule does to a layer, in words; a dash where it does nothing."""
    assert rule.operators is not None, "resolve the schedule first"
    queries = [f"queries {query_name(rule.operators)}"] if rule.query > 1 else []
    keys = [key_value_name(rule.operators)] if rule.key_value > 1 else []
    return "; ".join(keys + queries) or "–"
