"""The sections of a profile that say which model it is for and what to do with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from ..reduction.operators import OPERATORS_REVISION, Operators
from ..schedule import LayerRule, LengthMode, LengthRule, Schedule

Status = Literal["measured", "paper", "prior"]
STATUS_WORDS: Mapping[Status, str] = MappingProxyType(
    {
        "measured": "measured",
        "paper": "paper, not measured",
        "prior": "prior, not measured",
    }
)
"""The words for each status, wherever people read it."""

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Factor = Annotated[int, Field(ge=1)]
Factors = tuple[Factor, Factor]  # query, key-value
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Section(BaseModel):
    """An object of the document.

    A section refuses unknown keys, conversions between types, NaN and changes. The docstrings of
    its fields are their descriptions in the JSON Schema and in docs/profile.md.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def section_in(annotation: object) -> type[Section] | None:
    """Return the class of the objects that a field holds: alone, as an option or in a list."""
    parts = get_args(annotation)  # to Python 3.10, tuple[int, int] is a type as well
    if not parts and isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (section_in(part) for part in parts)
    return next((section for section in inner if section is not None), None)


class ModelRecord(Section):
    """The model that a profile is for."""

    family: Name
    """Name of the model family."""
    name: Name
    """Name of the model, as people write it."""
    weights: Name | None = None
    """Source of the weights: a hub id or a file name. Null when unknown."""
    width: Count | None = None
    """Channels C of a token. Null when unknown."""
    heads: Count | None = None
    """Attention heads of a global layer. Null when unknown."""
    patch_size: Count | None = None
    """Side of a patch in pixels. Null when unknown."""
    special_tokens: Annotated[int, Field(ge=0)] | None = None
    """Special tokens per frame. Null when unknown."""
    fingerprint: Sha256 | None = None
    """SHA-256 of the global-attention parameters. Null when no weights were at hand."""
    global_layers: Annotated[tuple[Name, ...], Field(min_length=1)]
    """Module names of the global attention layers, in the order in which a pass calls them. A
    module that a pass calls several times is listed once per call."""


class OperatorRecord(Section, extra="allow"):
    """One operator.

    Beside its name it holds the operator's own fields, by the names and with the values that its
    class has in spark3r. A field that is absent has the default of the class.
    """

    name: Name
    """Registered name of the operator, such as `token_stride`. An unknown name is refused."""


class OperatorsRecord(Section):
    """The operators of a layer."""

    query: OperatorRecord
    """Operator that merges the queries."""
    key_value: OperatorRecord
    """Operator that prunes the keys and values."""
    revision: Count
    """Revision of the operators' definitions. Another revision may give other results."""

    @classmethod
    def of(cls, operators: Operators) -> OperatorsRecord:
        """Return the record of ``operators`` as this version of spark3r defines them."""
        return cls(
            **{axis: OperatorRecord(**own) for axis, own in operators.to_dict().items()},
            revision=OPERATORS_REVISION,
        )

    def operators(self) -> Operators:
        """Return the operators recorded.

        Raises:
            ScheduleError: If an operator or one of its fields is unknown, or a value out of range.
        """
        return Operators.from_dict(self.model_dump(exclude={"revision"}))


class ExecutionRecord(Section):
    """Choices beyond attention that change what a pass costs or computes."""

    weights_dtype: Name | None = None
    """Precision that the weights were cast to, such as `bfloat16`. Null: as they were loaded."""
    heads: tuple[Name, ...] | None = None
    """Names of the prediction heads that run. Null: all of them."""
    compiled: tuple[Name, ...] = ()
    """Parts of the model that are compiled, such as `frame_blocks`."""

    def describe(self) -> str:
        """Return the choices in words, such as ``weights in bfloat16``; empty if there is none."""
        words = []
        if self.weights_dtype is not None:
            words.append(f"weights in {self.weights_dtype}")
        if self.heads is not None:
            words.append(f"only the heads {' and '.join(self.heads)}" if self.heads else "no heads")
        if self.compiled:
            words.append(f"compiled {' and '.join(self.compiled)}")
        return ", ".join(words)


class LengthRecord(Section):
    """How factors follow the length of a clip; see `spark3r.schedule.LengthRule`."""

    mode: LengthMode
    """Rule for the factors. `constant`: they hold as they are. `constant_kept_frames`: key-value
    factors grow with the clip, so that as many frames are kept as at `calibrated_frames`. `paper`:
    they multiply the length rule of Spark3R (eq. 4 and 5)."""
    calibrated_frames: Count | None = None
    """Length in frames that the factors were chosen for. Null when there is none."""
    min_frames: Count = 1
    """Length in frames below which a clip runs dense."""
    max_frames: Count | None = None
    """Longest clip in frames with evidence. A longer one runs, with a warning. Null: no bound."""

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
    """The rule of one call of a global attention layer."""

    index: Annotated[int, Field(ge=0)]
    """Place among the model's global layers, from 0."""
    module: Name
    """Module name of the layer, as in `model.global_layers`."""
    call: Annotated[int, Field(ge=0)] = 0
    """Number of earlier calls of the same module in a pass."""
    query: Factor
    """Reduction factor of the queries, 1 for none."""
    key_value: Factor
    """Reduction factor of the keys and values, 1 for none."""
    operators: OperatorsRecord | None = None
    """Operators of this layer alone. Null: those of the schedule."""

    def rule(self) -> LayerRule:
        """Return the layer rule recorded."""
        own = self.operators
        return LayerRule(self.query, self.key_value, None if own is None else own.operators())


class ScheduleRecord(Section):
    """One point of the trade-off between latency and quality."""

    name: Name
    """Name that selects the schedule, as in `spark3r show PROFILE --schedule NAME`."""
    length: LengthRecord
    """How the factors follow the length of a clip."""
    operators: OperatorsRecord
    """Operators of every layer that has none of its own."""
    execution: ExecutionRecord = ExecutionRecord()
    """Choices beyond attention that belong to the schedule."""
    layers: Annotated[tuple[LayerRecord, ...], Field(min_length=1)]
    """One rule per entry of `model.global_layers`, in the same order."""

    @classmethod
    def of(cls, name: str, schedule: Schedule, model: ModelRecord) -> ScheduleRecord:
        """Return the record of ``schedule`` for ``model``.

        Layers beyond the model's are named ``?``, so that the profile's own check reports the wrong
        number of layers.
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
                    call=call,
                    query=rule.query,
                    key_value=rule.key_value,
                    operators=None
                    if rule.operators is None
                    else OperatorsRecord.of(rule.operators),
                )
                for index, (module, call, rule) in enumerate(
                    zip(modules, earlier_calls(modules), schedule.layers, strict=False)
                )
            ),
        )

    def schedule(self) -> Schedule:
        """Return the schedule recorded.

        Raises:
            ScheduleError: If the operators or the length rule are not valid.
        """
        return Schedule(
            tuple(layer.rule() for layer in self.layers),
            self.operators.operators(),
            self.length.length_rule(),
        )


def earlier_calls(modules: Iterable[str]) -> list[int]:
    """Return, for each entry of a list of module names, how often it occurs further up."""
    seen: Counter[str] = Counter()
    calls = []
    for module in modules:
        calls.append(seen[module])
        seen[module] += 1
    return calls
