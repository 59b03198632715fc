"""The profile: the schedules of a model, their origin, and the evidence for them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, model_validator
from pydantic.json_schema import GenerateJsonSchema

from ..errors import ProfileError
from ..schedule import Schedule
from . import files
from .evidence import Measurement, Sensitivity
from .messages import problem_lines, profile_error, shown
from .model import ModelRecord, Name, ScheduleRecord, Section, Status
from .validation import validate, validate_status
from .version1 import upgrade

FORMAT: Literal["spark3r-profile"] = "spark3r-profile"
VERSION: Literal[2] = 2
SCHEMA_NAME = f"profile-v{VERSION}.schema.json"


class Profile(Section):
    """A model's schedules and the evidence for them."""

    schema_reference: str = Field(default=f"schema/{SCHEMA_NAME}", alias="$schema")
    """Place of the JSON Schema, for editors."""
    format: Literal["spark3r-profile"]
    """Mark that tells profiles from other JSON."""
    version: Literal[2]
    """Version of the format."""
    status: Status
    """Origin of the schedules. `measured`: they were run on this model. `paper`: a publication
    states them. `prior`: they follow a rule of thumb. Only `measured` is evidence."""
    source: Name | None = None
    """Citation that a paper or prior schedule is taken from. Null when measured."""
    notes: str = ""
    """The rule that was followed, and remarks for readers."""
    model: ModelRecord
    """The model that the profile is for."""
    default: Name
    """Name of the schedule that is used unless another one is asked for."""
    schedules: Annotated[tuple[ScheduleRecord, ...], Field(min_length=1)]
    """Points of the trade-off between latency and quality."""
    measurements: tuple[Measurement, ...] = ()
    """Evidence: one entry per device, precision, clip length and grid."""
    sensitivity: tuple[Sensitivity, ...] = ()
    """Effects of reducing single layers."""

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Profile:
        problems = [
            *validate(
                self.model, self.default, self.schedules, self.measurements, self.sensitivity
            ),
            *validate_status(
                self.status,
                self.source,
                self.notes,
                self.model.fingerprint,
                self.schedule_names(),
                self.measurements,
            ),
        ]
        if problems:
            raise profile_error((info.context or {}).get("source", "profile"), problems)
        return self

    @classmethod
    def create(
        cls,
        model: ModelRecord,
        schedules: Mapping[str, Schedule],
        *,
        status: Status,
        default: str | None = None,
        source: str | None = None,
        notes: str = "",
        measurements: Iterable[Measurement] = (),
        sensitivity: Iterable[Sensitivity] = (),
    ) -> Profile:
        """Return a profile.

        Args:
            model: The model that it is for.
            schedules: The schedules, by name.
            status: Origin of the schedules.
            default: Name of the default schedule; None takes the first one.
            source: Citation of a paper or prior schedule.
            notes: Remarks for readers.
            measurements: Measurements of the schedules.
            sensitivity: Sensitivities of the layers.

        Raises:
            ProfileError: If the parts do not make a valid profile.
        """
        try:
            return cls(
                format=FORMAT,
                version=VERSION,
                status=status,
                source=source,
                notes=notes,
                model=model,
                default=next(iter(schedules), "") if default is None else default,
                schedules=tuple(
                    ScheduleRecord.of(name, schedule, model) for name, schedule in schedules.items()
                ),
                measurements=tuple(measurements),
                sensitivity=tuple(sensitivity),
            )
        except ValidationError as error:
            raise profile_error("profile", problem_lines(error, cls)) from error

    @classmethod
    def parse(cls, text: str, source: str = "profile") -> Profile:
        """Return the profile written in JSON ``text``.

        Args:
            text: The document.
            source: Name of the document in error messages, such as the file's path.

        Raises:
            ProfileError: If it is not a valid profile. The message has one line per problem.
        """
        document = files.parse(text, source)
        problems = _not_a_profile(document) or files.structure_problems(document)
        if problems:
            raise profile_error(source, problems)
        if document.get("version") == 1:
            text = json.dumps(upgrade(document))
        try:
            return cls.model_validate_json(text, context={"source": source})
        except ValidationError as error:
            raise profile_error(source, problem_lines(error, cls)) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Return the profile stored in a file.

        Raises:
            ProfileError: If the file cannot be read or is not a valid profile.
        """
        return cls.parse(files.read_text(Path(path)), str(path))

    def text(self) -> str:
        """Return the document as it is stored: JSON, without the fields at their default."""
        fields = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return files.render({"$schema": self.schema_reference, **fields})

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Store the profile in a file. If writing fails, the file stays as it was.

        Args:
            path: The file.
            overwrite: Whether an existing file may be replaced.

        Raises:
            ProfileError: If the file exists and ``overwrite`` is not set, or cannot be written.
        """
        files.write_text(Path(path), self.text(), overwrite=overwrite)

    def schedule_names(self) -> tuple[str, ...]:
        """Return the names of the schedules, in the document's order."""
        return tuple(record.name for record in self.schedules)

    def schedule(self, name: str | None = None) -> Schedule:
        """Return a schedule by name, or the default one.

        Raises:
            ProfileError: If there is no schedule of that name.
        """
        wanted = self.default if name is None else name
        for record in self.schedules:
            if record.name == wanted:
                return record.schedule()
        raise ProfileError(
            f"the profile has no schedule {shown(wanted)}, expected one of: "
            f"{', '.join(self.schedule_names())}"
        )


def _not_a_profile(document: Any) -> list[str]:
    """Return why a document is not a profile of a known version; a list of at most one line."""
    if not isinstance(document, dict):
        return [f"the document is {shown(document)}, expected an object"]
    kind, version = document.get("format"), document.get("version")
    if kind != FORMAT:
        found = f"is {shown(kind)}" if "format" in document else "is missing"
        return [f'format {found}, expected "{FORMAT}"']
    if "version" in document and (type(version) is not int or version not in (1, VERSION)):
        newer = type(version) is int and version > VERSION
        hint = ": a newer spark3r reads it" if newer else ""
        return [f"version is {shown(version)}, expected 1 or {VERSION}{hint}"]
    return []


class _Untitled(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


_STATUS_RULES: list[dict[str, Any]] = [
    {
        "if": {"properties": {"status": {"const": "measured"}}},
        "then": {
            "properties": {
                "measurements": {"minItems": 1},
                "model": {
                    "properties": {"fingerprint": {"type": "string"}},
                    "required": ["fingerprint"],
                },
            },
            "required": ["measurements"],
        },
        "else": {
            "properties": {"measurements": {"maxItems": 0}, "source": {"type": "string"}},
            "required": ["source"],
        },
    },
    {
        "if": {"properties": {"status": {"const": "prior"}}},
        "then": {"properties": {"notes": {"pattern": r"\S"}}, "required": ["notes"]},
    },
]


@lru_cache(maxsize=1)
def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of profiles, generated from the class that validates them.

    It states the rules about the status, and no other rule of `validation`. It accepts a key that
    is given twice, 1.0 for an integer, and a date that does not exist.
    """
    schema = Profile.model_json_schema(schema_generator=_Untitled)
    head = {"$schema": GenerateJsonSchema.schema_dialect, "$id": SCHEMA_NAME}
    return {**head, **schema, "allOf": _STATUS_RULES}
