"""Profiles: the document, what is refused and how, schedules in and out, shipped ones."""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from profile_corpus import CONTRADICTORY, MALFORMED
from profile_documents import TIMING, Document, documents, measured, paper
from tiers import examples

from spark3r import LayerRule, LengthRule, Operators, ProfileError, Schedule
from spark3r.families.registry import detect
from spark3r.identity import describe
from spark3r.loading.load import load_model
from spark3r.profile import (
    ModelRecord,
    Profile,
    compare,
    evidence,
    load_profile,
    model,
    shipped_folder,
    shipped_names,
)
from spark3r.profile.evidence import Sensitivity
from spark3r.profile.model import LengthRecord, OperatorsRecord, ScheduleRecord, Section
from spark3r.reduction.operators import OPERATORS_REVISION, QueryMerging, TokenStride


def parse(document: Document) -> Profile:
    return Profile.parse(json.dumps(document), "x.json")


@settings(max_examples=examples(60), deadline=None)
@given(documents())
def test_round_trip(document: Document) -> None:
    profile = parse(document)
    text = profile.text()
    again = Profile.parse(text)
    assert again == profile
    assert again.text() == text
    assert text.endswith("}\n")
    for name in profile.schedule_names():
        schedule = profile.schedule(name)
        assert ScheduleRecord.of(name, schedule, profile.model).schedule() == schedule


def test_stored_text_leaves_out_defaults_and_keeps_the_order_of_the_class() -> None:
    document = json.loads(parse(measured()).text())
    assert list(document) == [
        "$schema",
        "format",
        "version",
        "status",
        "model",
        "default",
        "schedules",
        "measurements",
        "sensitivity",
    ]
    assert document["schedules"][0]["layers"][1] == {
        "index": 1,
        "module": "blocks.1.attn",
        "query": 2,
        "key_value": 8,
    }
    assert document["measurements"][0]["dense"] == {"latency": TIMING}
    named = measured() | {"$schema": "elsewhere.json"}
    assert json.loads(parse(named).text())["$schema"] == "elsewhere.json"


def test_records_hold_every_field_of_the_dataclasses() -> None:
    operators = Operators(
        QueryMerging(group=7, merge_anchor=False, unmerge="linear"),
        TokenStride(keep_special=True, keep_anchor=True, mass_correction=0.25),
    )
    record = OperatorsRecord.of(operators)
    assert record.operators() == operators
    assert record.model_dump() == {
        "query": {"name": "intra_group", "group": 7, "merge_anchor": False, "unmerge": "linear"},
        "key_value": {
            "name": "token_stride",
            "keep_special": True,
            "keep_anchor": True,
            "mass_correction": 0.25,
        },
        "revision": OPERATORS_REVISION,
    }
    assert set(LengthRecord.model_fields) == {f.name for f in dataclasses.fields(LengthRule)}


def test_every_field_is_described() -> None:
    sections = [Profile, *(getattr(part, name) for part in (model, evidence) for name in dir(part))]
    for section in sections:
        if isinstance(section, type(Section)) and issubclass(section, Section):
            for name, field in section.model_fields.items():
                assert (field.description or "").endswith("."), f"{section.__name__}.{name}"


def test_a_module_that_is_called_twice_has_two_rules() -> None:
    model = ModelRecord(family="vggt", name="Loops", global_layers=("loop", "once", "loop"))
    schedule = Schedule((LayerRule(1, 2), LayerRule(1, 3), LayerRule(1, 4)))
    profile = Profile.create(model, {"fast": schedule}, status="paper", source="a paper")
    assert [layer.call for layer in profile.schedules[0].layers] == [0, 0, 1]
    again = Profile.parse(profile.text())
    assert again == profile
    assert again.schedule() == schedule


@pytest.mark.parametrize(
    ("change", "message"),
    [pytest.param(*case, id=name) for name, case in (MALFORMED | CONTRADICTORY).items()],
)
def test_malformed_documents(change: Callable[[Document], None], message: str) -> None:
    document = measured()
    document["schedules"][0]["length"]["min_frames"] = 9
    change(document)
    with pytest.raises(ProfileError) as caught:
        parse(document)
    assert str(caught.value) == (message if message.startswith("x.json") else f"x.json: {message}")


def test_status_rules_of_paper_and_prior() -> None:
    document = paper()
    document.update(status="prior", notes=" ")
    with pytest.raises(ProfileError, match=r'notes is empty, .* with status "prior"'):
        parse(document)
    document["notes"] = "a rule"
    assert parse(document).status == "prior"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2"),
        ('{"a": 1,}', "not JSON: "),  # the rest differs from Python 3.13 on
        ("[1, 2]", "the document is a list of 2, expected an object"),
        ("null", "the document is null, expected an object"),
        ("[" * 100_000, "the document is nested more than 20 levels deep"),
        (
            f'{{"format": "spark3r-profile", "version": 2, "notes": {"[" * 300 + "]" * 300}}}',
            "the document is nested more than 20 levels deep",
        ),
        (
            '{"format": "spark3r-profile", "version": 2, "notes": "\\ud800"}',
            "not JSON that can be read: ",
        ),
    ],
)
def test_text_that_is_no_document(text: str, message: str) -> None:
    with pytest.raises(ProfileError) as caught:
        Profile.parse(text, "x.json")
    assert str(caught.value).startswith(f"x.json: {message}")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite(number: str) -> None:
    text = json.dumps(measured()).replace('"relative_error": 0.02', f'"relative_error": {number}')
    with pytest.raises(ProfileError) as caught:
        Profile.parse(text, "x.json")
    found = number.replace("1e999", "Infinity")
    assert str(caught.value) == (
        f"x.json: measurements[0].latency_model.relative_error is {found}, expected a finite number"
    )


def test_repeated_keys() -> None:
    text = json.dumps(paper())
    text = text.replace('"query": 2', '"query": 1, "query": 2').replace(
        '"default"', '"default": "slow", "default"'
    )
    with pytest.raises(ProfileError) as caught:
        Profile.parse(text, "x.json")
    assert str(caught.value) == (
        "x.json: 2 problems\n"
        "  default is given twice\n"
        "  schedules[0].layers[1].query is given twice"
    )


def test_many_problems_are_cut() -> None:
    document = paper()
    document.update({f"key{index}": 0 for index in range(50)})
    with pytest.raises(ProfileError) as caught:
        parse(document)
    lines = str(caught.value).splitlines()
    assert lines[0] == "x.json: 50 problems"
    assert lines[-1] == "  and 30 more"
    assert len(lines) == 22


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measurements": [{}] * 10_001}, "measurements is a list of 10001, expected a profile"),
        ({"zebra": [[0] * 9_999] * 11}, "the document has more than 100000 values, expected a"),
        ({"zebra": json.loads("[" * 20 + "]" * 20)}, "the document is nested more than 20 levels"),
        ({"measurements": [{}] * 900}, "the document has 10800 problems, expected a profile"),
    ],
)
def test_documents_that_are_too_large_for_a_list_of_problems(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ProfileError) as caught:
        parse(measured() | changes)
    assert str(caught.value).startswith(f"x.json: {message}")
    assert "\n" not in str(caught.value)


def test_create_and_schedules() -> None:
    model = ModelRecord(family="vggt", name="Small", global_layers=("a", "b"))
    own = Operators(key_value=TokenStride(keep_anchor=True, mass_correction=1))
    slow = Schedule(
        (LayerRule(1, 2), LayerRule(2, 4, own)),
        length=LengthRule("constant_kept_frames", calibrated_frames=48, max_frames=500),
    )
    fast = Schedule.uniform(2, 2, 8)
    profile = Profile.create(
        model, {"fast": fast, "slow": slow}, status="paper", source="a paper", default="slow"
    )
    assert profile.schedule() == slow
    assert profile.schedule("fast") == fast
    assert Profile.parse(profile.text()) == profile
    with pytest.raises(ProfileError, match=r'no schedule "slw", expected one of: fast, slow$'):
        profile.schedule("slw")


def test_create_refuses_what_load_refuses() -> None:
    model = ModelRecord(family="vggt", name="Small", global_layers=("a", "b"))
    with pytest.raises(ProfileError, match="expected one rule for each of the model's 2 global"):
        Profile.create(model, {"x": Schedule.dense(3)}, status="paper", source="a paper")
    with pytest.raises(ProfileError, match="schedules is a list of 0, expected 1 or more entries"):
        Profile.create(model, {}, status="paper", source="a paper")
    with pytest.raises(ProfileError, match=r"source is null, expected a citation"):
        Profile.create(model, {"x": Schedule.dense(2)}, status="prior", notes="a rule")


def test_sections_do_not_change() -> None:
    profile = parse(measured())
    with pytest.raises(ValueError, match="frozen"):
        profile.default = "x"
    assert isinstance(profile.sensitivity[0], Sensitivity)
    assert profile.sensitivity[0].values[1] == (0.03, None)


def test_shipped_profiles() -> None:
    names = tuple(name for name in shipped_names() if load_profile(name).status != "measured")
    expected = {
        "vggt-1b": ("vggt", 24, "paper", {*range(11, 17)}),
        "pi3": ("pi3", 18, "paper", {*range(11, 17)}),
        "pi3x": ("pi3", 18, "prior", {*range(11, 17)}),
        "da3-giant": ("da3", 14, "paper", {*range(3, 13)}),
        "da3-large": ("da3", 8, "prior", {*range(8)}),
        "vggt-omega-1b": ("omega", 19, "paper", {*range(7, 14), 16}),
        "map-anything": ("mapanything", 8, "prior", {*range(8)}),
        "worldmirror-2": ("worldmirror", 24, "prior", {*range(24)}),
        "worldmirror-1": ("worldmirror", 24, "prior", {*range(24)}),
        "panovggt": ("panovggt", 18, "prior", {*range(18)}),
    }
    assert names == tuple(sorted(expected))
    for name in names:
        profile = load_profile(name)
        family, layers, status, sensitive = expected[name]
        assert (profile.model.family, len(profile.model.global_layers)) == (family, layers)
        assert profile.status == status
        assert profile.source is not None
        assert "2605.06270 v2" in profile.source
        assert profile.model.fingerprint is None
        assert not profile.measurements
        rules = profile.schedule().resolve(1000)
        assert [rule.query for rule in rules] == [4] * layers
        assert {i for i, rule in enumerate(rules) if rule.key_value == 25} == sensitive
        assert {rule.key_value for rule in rules} <= {25, 75}


def test_measured_shipped_profiles_are_of_the_shipped_weights() -> None:
    for name in shipped_names():
        profile = load_profile(name)
        if profile.status == "measured":
            model = load_model(profile.model.name)
            family = detect(model)
            record = describe(family.name, family.attention(model), family.metadata(model))
            found = compare(profile, record)
            assert not found.errors
            assert not found.warnings


def test_shipped_files_are_up_to_date() -> None:
    generator = runpy.run_path(str(shipped_folder() / "generate.py"))
    contents = generator["contents"]()
    schema = next(name for name in contents if name.startswith("schema/"))
    del contents[schema]  # compared in test_profile_schema.py, whatever pydantic's version
    for name, text in contents.items():
        stored = (shipped_folder() / name).read_text(encoding="utf-8")
        assert stored == text, f"{name}: run python profiles/generate.py"
    stored_profiles = {path.name for path in shipped_folder().glob("*.json")}
    assert stored_profiles == {name for name in contents if name.endswith(".json")}


def test_the_example_of_the_page_about_the_format_is_a_profile() -> None:
    page = (shipped_folder().parent / "docs" / "profile.md").read_text(encoding="utf-8")
    example = page.partition("```json\n")[2].partition("```")[0]
    assert Profile.parse(example).schedule().layers == (LayerRule(1, 4),) * 2


def test_load_profile_by_name_path_or_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = load_profile("pi3")
    assert load_profile(profile) is profile
    profile.save(tmp_path / "mine")
    profile.save(tmp_path / "mine.json")
    monkeypatch.chdir(tmp_path)
    assert load_profile("mine.json") == profile
    assert load_profile("./mine") == profile
    assert load_profile(Path("mine")) == profile
    with pytest.raises(ProfileError, match=r"did you mean the file '\./mine'\?"):
        load_profile("mine")
    with pytest.raises(ProfileError, match="named 'VGGT1B': did you mean vggt-1b"):
        load_profile("VGGT1B")
    with pytest.raises(ProfileError, match="`spark3r list` shows all"):
        load_profile("")
    with pytest.raises(ProfileError, match="a profile cannot be a NoneType, expected a name"):
        load_profile(None)  # type: ignore[arg-type]


def test_files_that_are_wrong_throughout_are_refused_in_time() -> None:
    keys = ", ".join(f'"key{index}": 0' for index in range(50_000))
    text = json.dumps(paper())[:-1] + f", {keys}}}"
    with pytest.raises(ProfileError, match=r"x\.json: the document has 50000 problems"):
        Profile.parse(text, "x.json")
    document = paper()
    document["schedules"][0]["layers"] *= 5_000
    with pytest.raises(ProfileError, match=r"layers is a list of 10000, expected one rule"):
        parse(document)
    with pytest.raises(ProfileError, match=r"x is given twice"):
        Profile.parse(text.replace('"notes"', '"x": 1, "x": 2, "notes"'), "x.json")
