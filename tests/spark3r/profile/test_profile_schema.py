"""The shipped JSON Schema: up to date, and of one mind with the class that validates."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from profile_corpus import CONTRADICTORY, MALFORMED
from profile_documents import Document, documents, measured, mutated, paper
from pydantic import ValidationError
from tiers import examples

from spark3r import ProfileError
from spark3r.profile import Profile, shipped_folder
from spark3r.profile.document import SCHEMA_NAME, json_schema

SCHEMA = json_schema()
SHAPE = {key: value for key, value in SCHEMA.items() if key != "allOf"}  # without status rules


def accepts(schema: dict[str, Any], value: Document) -> bool:
    return Draft202012Validator(schema).is_valid(value)


def validates(value: Document) -> bool:
    try:
        Profile.parse(json.dumps(value))
    except ProfileError:
        return False
    return True


def is_well_formed(value: Document) -> bool:
    """Whether the class takes each field by itself; what fields say together may be wrong."""
    try:
        Profile.model_validate_json(json.dumps(value))
    except ValidationError:
        return False
    except ProfileError:  # raised when all fields are there
        return True
    return True


def _normal(node: Any) -> Any:
    """Drop what pydantic's versions write differently: types of constants, wrapped references."""
    if isinstance(node, dict):
        node = {**node, **node["allOf"][0]} if len(node.get("allOf", ())) == 1 else node
        return {
            key: _normal(value)
            for key, value in node.items()
            if not (key in ("type", "enum") and "const" in node)
            and not (key == "allOf" and len(value) == 1)
        }
    return [_normal(entry) for entry in node] if isinstance(node, list) else node


def test_shipped_schema_is_up_to_date() -> None:
    stored = json.loads((shipped_folder() / "schema" / SCHEMA_NAME).read_text(encoding="utf-8"))
    assert _normal(stored) == _normal(SCHEMA), "run python profiles/generate.py"


def test_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@settings(max_examples=examples(40), deadline=None)
@given(documents())
def test_both_accept_valid_documents(value: Document) -> None:
    assert accepts(SCHEMA, value)
    assert validates(value)


@settings(max_examples=examples(300), deadline=None)
@given(st.sampled_from([paper(), measured()]).flatmap(mutated))
def test_both_agree_on_the_shape_of_mutated_documents(value: Document) -> None:
    assert accepts(SHAPE, value) == is_well_formed(value)
    if validates(value):
        assert accepts(SCHEMA, value)


@pytest.mark.parametrize("change", [case[0] for case in MALFORMED.values()], ids=list(MALFORMED))
def test_schema_refuses_malformed_documents(change: Callable[[Document], None]) -> None:
    value = measured()
    change(value)
    assert not accepts(SCHEMA, value)


@pytest.mark.parametrize(
    "change", [case[0] for case in CONTRADICTORY.values()], ids=list(CONTRADICTORY)
)
def test_schema_cannot_state_rules_between_fields(change: Callable[[Document], None]) -> None:
    value = measured()
    change(value)
    assert accepts(SCHEMA, value)


def test_schema_does_not_check_dates() -> None:
    value = measured()
    value["measurements"][0]["date"] = "2026-02-30"
    assert accepts(SCHEMA, value)
    with pytest.raises(ProfileError, match=r'date is "2026-02-30", expected a date such as'):
        Profile.parse(json.dumps(value))
