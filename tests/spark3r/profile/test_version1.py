"""Profiles of version 1: stored documents load, and mean what they meant."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from jsonschema import Draft202012Validator
from profile_documents import copied, mutated

from spark3r import (
    LayerRule,
    LengthRule,
    Operators,
    ProfileError,
    QueryMerging,
    Schedule,
    TemporalStride,
    TokenStride,
)
from spark3r.profile import Profile, load_profile, shipped_folder

FOLDER = Path(__file__).parent / "version1"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
SHIPPED = ("da3-giant", "da3-large", "pi3", "pi3x", "vggt-1b", "vggt-omega-1b")


def stored(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return document


def parse(document: dict[str, Any]) -> Profile:
    return Profile.parse(json.dumps(document), "x.json")


def operators(flat: dict[str, Any]) -> Operators:
    assert flat["query"] == "intra_group"
    prune = {"temporal_stride": TemporalStride, "token_stride": TokenStride}[flat["key_value"]]
    return Operators(
        QueryMerging(flat["group"], flat["merge_anchor"], flat["unmerge"]),
        prune(flat["keep_special"], flat["keep_anchor"], flat["mass_correction"]),
    )


def schedule(record: dict[str, Any]) -> Schedule:
    rules = (
        LayerRule(
            layer["query"],
            layer["key_value"],
            operators(layer["operators"]) if "operators" in layer else None,
        )
        for layer in record["layers"]
    )
    return Schedule(tuple(rules), operators(record["operators"]), LengthRule(**record["length"]))


def test_there_are_documents() -> None:
    assert set(SHIPPED) | {"reference", "small"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_stored_documents_are_valid_by_their_own_schema(name: str) -> None:
    text = (shipped_folder() / "schema" / "profile-v1.schema.json").read_text(encoding="utf-8")
    Draft202012Validator(json.loads(text)).validate(stored(name))


@pytest.mark.parametrize("name", NAMES)
def test_schedules_mean_what_they_meant(name: str) -> None:
    document, profile = stored(name), Profile.load(FOLDER / f"{name}.json")
    assert profile.default == document["default"]
    assert profile.model.model_dump(mode="json") == document["model"]
    for record in document["schedules"]:
        assert profile.schedule(record["name"]) == schedule(record)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_stored_again_as_version_2(name: str) -> None:
    profile = Profile.load(FOLDER / f"{name}.json")
    text = profile.text()
    assert json.loads(text)["version"] == 2
    assert json.loads(text)["$schema"] == "schema/profile-v2.schema.json"
    assert Profile.parse(text) == profile


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_are_the_same_in_both_versions(name: str) -> None:
    old, new = Profile.load(FOLDER / f"{name}.json"), load_profile(name)
    assert old.schedule().length == LengthRule("paper")  # that of today leaves short clips dense
    assert replace(old.schedule(), length=new.schedule().length) == new.schedule()
    assert old.model_copy(update={"notes": new.notes, "schedules": new.schedules}) == new


@pytest.mark.parametrize("name", ["reference", "small"])
def test_evidence_is_what_it_was(name: str) -> None:
    document, profile = stored(name), Profile.load(FOLDER / f"{name}.json")
    (old,), (new,) = document["measurements"], profile.measurements
    found = new.model_dump(mode="json", exclude_unset=True)
    for part in ("device", "dtype", "frames", "grid", "dense", "wall", "schedules", "date"):
        assert found[part] == old[part]
    assert found["latency_model"] == old["latency_model"]
    assert found["environment"] == old["environment"]
    assert [(kernel.operation, kernel.implementation) for kernel in new.kernels] == [
        ("attention", old["attention_backend"])
    ]
    roles = {"calibration": "search", "selection": "validation", "held_out": "held_out"}
    assert [(clip.name, clip.digest, clip.role) for clip in new.clips] == [
        (clip["name"], clip["digest"], roles[clip["role"]]) for clip in old["clips"]
    ]
    for run, record in zip(new.baselines, old["baselines"], strict=True):
        assert run.operators.operators() == operators(record["operators"])
        assert [list(factors) for factors in run.factors] == record["factors"]
    for table, record in zip(profile.sensitivity, document["sensitivity"], strict=True):
        assert table.operators.operators() == operators(record["operators"])
        assert [list(row) for row in table.values] == record["values"]
        assert [list(row) for row in table.spreads] == record.get("spreads", [])


def test_profiles_from_before_there_was_a_choice_of_unmerging_copy() -> None:
    document = stored("small")
    del document["schedules"][0]["operators"]["unmerge"]
    profile = parse(document)
    assert profile.schedules[0].operators.query.model_dump()["unmerge"] == "copy"
    assert profile.schedule().operators == operators(stored("small")["schedules"][0]["operators"])


def test_null_operators_of_a_layer_are_those_of_the_schedule() -> None:
    document = stored("small")
    document["schedules"][0]["layers"][0]["operators"] = None
    assert parse(document) == parse(stored("small"))


def test_problems_are_reported_as_in_version_2() -> None:
    document = stored("small")
    document["schedules"][0]["layers"][0]["query"] = 0
    document["schedules"][0]["operators"]["mass_correction"] = 2
    document["measurements"][0]["clips"][0]["role"] = "x"
    with pytest.raises(ProfileError) as caught:
        parse(document)
    assert str(caught.value) == (
        "x.json: 2 problems\n"
        "  schedules[0].layers[0].query is 0, expected 1 or more\n"
        '  measurements[0].clips[0].role is "x", expected '
        "'search', 'validation' or 'held_out'"
    )
    document = stored("small")
    document["schedules"][0]["operators"]["mass_correction"] = 2
    document["schedules"][0]["operators"]["gruop"] = 2
    with pytest.raises(ProfileError, match=r"schedules\[0\]\.operators\.gruop is unknown"):
        parse(document)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(mutated(stored("small")))
def test_malformed_documents_are_refused_or_read_but_never_crash(document: dict[str, Any]) -> None:
    before = copied(document)
    try:
        profile = parse(document)
    except ProfileError:
        return
    assert Profile.parse(profile.text()) == profile
    assert document == before


@pytest.mark.parametrize("depth", [100, 300, 500, 800, 900, 940, 960, 980, 990, 1000, 100_000])
def test_deep_documents_are_refused(depth: int) -> None:
    nested = "[" * depth + "]" * depth
    text = f'{{"format": "spark3r-profile", "version": 1, "notes": {nested}}}'
    with pytest.raises(ProfileError):
        Profile.parse(text)


def test_numbers_that_are_not_finite_are_refused() -> None:
    text = json.dumps(stored("small")).replace('"relative_error": 0.02', '"relative_error": NaN')
    with pytest.raises(ProfileError, match="relative_error is NaN, expected a finite number"):
        Profile.parse(text)
