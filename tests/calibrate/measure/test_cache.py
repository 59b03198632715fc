from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from faulty_runs import make_clip
from small_models import make_model
from tiny_job import Notes
from torch import nn

from calibrate.budget import parse_budget
from calibrate.measure.cache import cached_table, table_key
from calibrate.measure.probe import COLUMNS
from calibrate.measure.residual_drift import drift
from calibrate.settings import Job, Settings
from spark3r import Operators
from spark3r.reduction.operators import QueryMerging
from spark3r.runner import Runner

CLIP = make_clip(4)
OPERATORS = Operators(QueryMerging(group=2))
KEY = {"model": "abc", "settings": {"factors": [1, 2]}}


def made() -> pd.DataFrame:
    values = (
        "probe",
        '{"group": 2, "query": "x"}',
        0,
        "query",
        2,
        "score.error",
        0.1 + 0.2,
        0.0,
        3,
    )
    return pd.DataFrame([dict(zip(COLUMNS, values, strict=True))])


def job(folder: Path | None, model: nn.Module | None = None, **changes: Any) -> Job:
    runner = Runner.of(model or make_model(), **changes)
    return Job(runner, Settings(parse_budget("2x"), cache=folder), "error", Notes())


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> pd.DataFrame:
        self.calls += 1
        return made()


def test_a_table_is_measured_once_and_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    measure, work = Counted(), job(tmp_path / "new" / "folder")
    first = cached_table(work, KEY, measure)
    second = cached_table(work, KEY, measure)
    assert measure.calls == 1
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 1


def test_a_real_table_survives_storage(tmp_path: Path, model: nn.Module) -> None:
    table = drift(
        Runner.of(model), [CLIP], [OPERATORS], query_factors=(2,), key_value_factors=(2, 4)
    )
    cached_table(job(tmp_path), KEY, lambda: table)

    def never() -> pd.DataFrame:
        raise AssertionError

    pd.testing.assert_frame_equal(cached_table(job(tmp_path), KEY, never), table, check_exact=True)


def test_another_key_measures_again(tmp_path: Path) -> None:
    measure, work = Counted(), job(tmp_path)
    cached_table(work, KEY, measure)
    cached_table(work, KEY | {"model": "abd"}, measure)
    assert measure.calls == 2


def test_without_a_folder_nothing_is_stored() -> None:
    measure, work = Counted(), job(None)
    cached_table(work, KEY, measure)
    cached_table(work, KEY, measure)
    assert measure.calls == 2


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"key": 1}', b"\xff\xfe\x00", None])
def test_a_damaged_file_is_measured_again(tmp_path: Path, damage: bytes | None) -> None:
    measure, work = Counted(), job(tmp_path)
    cached_table(work, KEY, measure)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    pd.testing.assert_frame_equal(cached_table(work, KEY, measure), made())
    assert measure.calls == 2
    cached_table(work, KEY, measure)
    assert measure.calls == 2


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    work = job(blocked)
    table = cached_table(work, KEY, made)
    assert "could not be stored" in work.reporter.lines[0]
    pd.testing.assert_frame_equal(table, made())


def test_a_full_disk_leaves_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    work = job(tmp_path)
    cached_table(work, KEY, made)
    assert "No space left" in work.reporter.lines[0]
    assert list(tmp_path.iterdir()) == []


def test_the_key_holds_everything_a_table_depends_on(model: nn.Module) -> None:
    def key(**changes: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "job": job(None, model),
            "clips": [CLIP],
            "operators": [OPERATORS],
            "factors": (2, 4),
        }
        return table_key(**(arguments | changes))

    before = key()
    assert before == key()
    darker = replace(CLIP, images=CLIP.images * 0.5)
    bare = replace(CLIP, depth=None)
    others = [
        key(clips=[darker]),
        key(clips=[bare]),
        key(clips=[CLIP, darker]),
        key(operators=[Operators(QueryMerging(group=3))]),
        key(factors=(2, 8)),
        key(job=job(None, model, dtype=torch.bfloat16)),
        key(job=job(None, model, dtype=torch.float16)),
    ]
    with torch.no_grad():
        head = next(iter(model.camera_head.parameters()))  # type: ignore[union-attr]
        head += 1
    others.append(key())
    others.append(key(job=job(None, model.bfloat16())))
    assert all(other != before for other in others)
    assert all(others.count(other) == 1 for other in others)
