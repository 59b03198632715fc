"""The sections of a profile that say which model it is for and what to do with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from ..schedule import (
    OPERATORS_REVISION,
    KeyValueOperator,
    LayerRule,
    LengthMode,
    LengthRule,
    Operators,
    QueryOperator,
    Schedule,
    Unmerging,
)

Status = Literal["measured", "paper", "prior"]
STATUS_WORDS: Mapping[Status, str] = MappingProxyType(
    {
        "measured": "measured",
        "paper": "paper, not measured",
        "prior": "prior, not measured",
    }
)
"""How a status is written wherever people read it."""

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Factor = Annotated[int, Field(ge=1)]
Factors = tuple[Factor, Factor]  # query, key-value
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Section(BaseModel):
    """One object of the document: no unknown keys, no conversions, no NaN, no changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelRecord(Section):
    """The model that a profile is for.

    Attributes:
        family: Name of the model family.
        name: What people call the model.
        weights: Where its weights are found (a hub id or a file name), or null when unknown.
        width: Channels C of a token, or null when unknown.
        heads: Attention heads of a global layer, or null when unknown.
        patch_size: Side of a patch in pixels, or null when unknown.
        special_tokens: Special tokens per frame, or null when unknown.
        fingerprint: Fingerprint of the global-attention parameters, or null when not measured.
        global_layers: Module names of the global attention layers, in the order in which a pass
            meets them.
    """

    family: Name
    name: Name
    weights: Name | None = None
    width: Count | None = None
    heads: Count | None = None
    patch_size: Count | None = None
    special_tokens: Annotated[int, Field(ge=0)] | None = None
    fingerprint: Sha256 | None = None
    global_layers: Annotated[tuple[Name, ...], Field(min_length=1)]


class OperatorsRecord(Section):
    """How queries are merged and how keys and values are thinned; see ``schedule.Operators``.

    Attributes:
        revision: Revision of the operators' definitions; another one gives other results.
    """

    query: QueryOperator
    group: Count
    merge_anchor: bool
    unmerge: Unmerging = "copy"  # what profiles from before there was a choice mean
    key_value: KeyValueOperator
    keep_special: bool
    keep_anchor: bool
    mass_correction: Annotated[float, Field(ge=0, le=1)]
    revision: Count

    @classmethod
    def of(cls, operators: Operators) -> OperatorsRecord:
        """Return the record of ``operators`` as this version of spark3r defines them."""
        values = asdict(operators) | {"mass_correction": float(operators.mass_correction)}
        return cls(**values, revision=OPERATORS_REVISION)

    def operators(self) -> Operators:
        """Return the operators recorded."""
        return Operators(**self.model_dump(exclude={"revision"}))


class LengthRecord(Section):
    """How factors follow the length of a clip; see ``schedule.LengthRule``."""

    mode: LengthMode
    calibrated_frames: Count | None
    min_frames: Count
    max_frames: Count | None

    @classmethod
    def of(cls, length: LengthRule) -> LengthRecord:
        """Return the record of a length rule."""
        return cls(**asdict(length))

    def length_rule(self) -> LengthRule:
        """Return the length rule recorded.

        Raises:
            ScheduleError: If the bounds contradict each other.
        """
        return LengthRule(**self.model_dump())


class LayerRecord(Section):
    """The rule of one global layer.

    Attributes:
        index: Place among the model's global layers, from 0.
        module: Its module name, as in ``model.global_layers``.
        query: Reduction factor of the queries.
        key_value: Reduction factor of keys and values.
        operators: The layer's own operators; absent for the schedule's.
    """

    index: Annotated[int, Field(ge=0)]
    module: Name
    query: Factor
    key_value: Factor
    operators: OperatorsRecord | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if self.operators is None:
            del values["operators"]
        return values

    def rule(self) -> LayerRule:
        """Return the layer rule recorded."""
        own = self.operators
        return LayerRule(self.query, self.key_value, None if own is None else own.operators())


class ScheduleRecord(Section):
    """One point of the trade-off between latency and quality.

    Attributes:
        name: What ``schedule=`` selects it by.
        length: How its factors follow the length of a clip.
        operators: Operators of every layer that has none of its own.
        layers: One rule per global layer, in the model's order.
    """

    name: Name
    length: LengthRecord
    operators: OperatorsRecord
    layers: Annotated[tuple[LayerRecord, ...], Field(min_length=1)]

    @classmethod
    def of(cls, name: str, schedule: Schedule, model: ModelRecord) -> ScheduleRecord:
        """Return the record of ``schedule`` for ``model``.

        Modules beyond the model's are named ``?``, so that a wrong layer count is reported by the
        profile's own check.
        """
        modules = model.global_layers + ("?",) * len(schedule.layers)
        return cls(
            name=name,
            length=LengthRecord.of(schedule.length),
            operators=OperatorsRecord.of(schedule.operators),
            layers=tuple(
                LayerRecord(
                    index=index,
                    module=module,
                    query=rule.query,
                    key_value=rule.key_value,
                    operators=None
                    if rule.operators is None
                    else OperatorsRecord.of(rule.operators),
                )
                for index, (module, rule) in enumerate(zip(modules, schedule.layers, strict=False))
            ),
        )

    def schedule(self) -> Schedule:
        """Return the schedule recorded.

        Raises:
            ScheduleError: If the length rule contradicts itself.
        """
        return Schedule(
            tuple(layer.rule() for layer in self.layers),
            self.operators.operators(),
            self.length.length_rule(),
        )
