"""Rendered clips on disk."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from calibrate.cli.clips import reader
from calibrate.cli.rendered import revision, stored_clip
from spark3r import Clip
from spark3r.families.registry import named_family
from spark3r.reference.scenes.render import rendered_clip


def folder_of(cache: Path) -> Path:
    return cache / "rendered" / revision()


def same(a: Clip, b: Clip) -> bool:
    return a.name == b.name and all(
        torch.equal(getattr(a, each.name), getattr(b, each.name))
        for each in fields(Clip)
        if each.name != "name"
    )


def fail() -> Clip:
    raise AssertionError("rendered again")


def test_a_clip_that_was_rendered_is_read_from_disk(tmp_path: Path) -> None:
    family = named_family("vggt")
    read = reader(family, 16, skip_bad=False, cache=tmp_path)
    plain = reader(family, 16, skip_bad=False)("rendered:1000003", 3).clip
    first = read("rendered:1000003", 3).clip
    (path,) = folder_of(tmp_path).iterdir()
    assert path.name == "1000003-3-16.safetensors"
    again = stored_clip(tmp_path, "1000003-3-16", fail)
    assert same(first, plain)
    assert same(again, plain)
    path.write_bytes(path.read_bytes()[:-7])  # cut off
    assert same(read("rendered:1000003", 3).clip, plain)
    assert same(stored_clip(tmp_path, "1000003-3-16", fail), plain)


def test_the_folder_is_bounded_and_holds_no_other_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder_of(tmp_path).parent / "older").mkdir(parents=True)
    clip = rendered_clip(7, 2, 16, 16)
    names = [f"{number}-2-16" for number in range(4)]
    stored_clip(tmp_path, names[0], lambda: clip)
    (path,) = folder_of(tmp_path).iterdir()
    monkeypatch.setattr("calibrate.cli.rendered.MOST_BYTES", 2.5 * path.stat().st_size)
    for age, name in enumerate(names[:3]):
        stored_clip(tmp_path, name, lambda: clip)
        used = folder_of(tmp_path) / f"{name}.safetensors"
        if used.exists():
            os.utime(used, (1000 + age, 1000 + age))
    stored_clip(tmp_path, names[1], fail)  # used just now
    stored_clip(tmp_path, names[3], lambda: clip)
    left = {each.stem for each in folder_of(tmp_path).iterdir()}
    assert left == {names[1], names[3]}
    assert [each.name for each in folder_of(tmp_path).parent.iterdir()] == [revision()]


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "rendered").write_text("a file")
    clip = rendered_clip(7, 2, 16, 16)
    assert stored_clip(tmp_path, "7-2-16", lambda: clip) is clip
