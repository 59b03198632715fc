"""Profile files: what cannot be read, and writing as a whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
from profile_documents import paper

from spark3r.errors import ProfileError, ProfileExistsError
from spark3r.profile import Profile
from spark3r.profile.files import MAX_BYTES, MAX_LENGTH


@pytest.fixture
def profile() -> Profile:
    return Profile.parse(json.dumps(paper()))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty, expected a profile (JSON)"),
        (b" \n\t ", "is empty, expected a profile (JSON)"),
        (b'{"format": "\xe9"}', "not UTF-8 (byte 12)"),
        (b"\x00" * 40, "not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b" " * (MAX_BYTES + 1), "larger than 4 MiB, expected a profile"),
        (b"[" * 9999, "the document is nested more than 20 levels deep, expected a profile"),
    ],
)
def test_unreadable_files(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    with pytest.raises(ProfileError) as caught:
        Profile.load(path)
    assert str(caught.value) == f"{path}: {message}"


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "no.json", "no such file"),
        (tmp_path, "is a folder, expected a profile file (.json)"),
        (tmp_path / "no" / "x.json", "no such file"),
    ):
        with pytest.raises(ProfileError) as caught:
            Profile.load(path)
        assert str(caught.value) == f"{path}: {message}"


POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no umask, and links need a right")


@POSIX
def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)  # nobody writes to it, so reading it would never end
    (tmp_path / "link.json").symlink_to("/dev/zero")
    for path in (pipe, tmp_path / "link.json", Path("/dev/zero")):
        with pytest.raises(ProfileError) as caught:
            Profile.load(path)
        assert str(caught.value) == (f"{path}: is no regular file, expected a profile file (.json)")


@pytest.mark.parametrize("name", ["a\0b.json", "x" * 5000 + ".json"], ids=["NUL", "long"])
def test_paths_that_no_file_has(name: str, profile: Profile) -> None:
    with pytest.raises(ProfileError, match=r"\.json: (cannot be read \(|no such file)"):
        Profile.load(name)
    with pytest.raises(ProfileError, match=r"\.json: cannot be written \("):
        profile.save(name)


def test_a_profile_opens_no_file_but_its_own(tmp_path: Path) -> None:
    document = paper()
    document["model"].update(name="/etc/hosts", weights="../../etc/passwd")
    document["$schema"] = "/dev/zero"
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document))
    opened: list[object] = []
    watching = True

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "open":
            opened.append(arguments[0])

    sys.addaudithook(watch)  # it stays until the process ends
    try:
        Profile.load(path).schedule()
    finally:
        watching = False
    assert set(opened) == {str(path)}


def test_a_profile_that_could_not_be_read_again_is_not_written(
    tmp_path: Path, profile: Profile
) -> None:
    many_layers = profile.model.model_copy(update={"global_layers": ("x",) * (MAX_LENGTH + 1)})
    for changes in ({"notes": "x" * MAX_BYTES}, {"model": many_layers}):
        large = profile.model_copy(update=changes)
        with pytest.raises(
            ProfileError, match=r"x\.json: the profile is too large to be read again"
        ):
            large.save(tmp_path / "x.json")
        assert not list(tmp_path.iterdir())


def test_a_byte_order_mark_is_no_harm(tmp_path: Path, profile: Profile) -> None:
    path = tmp_path / "x.json"
    path.write_text(profile.text(), encoding="utf-8-sig")
    assert Profile.load(path) == profile


def test_save_and_load(tmp_path: Path, profile: Profile) -> None:
    path = tmp_path / "x.json"
    profile.save(path)
    assert path.read_bytes() == profile.text().encode()
    assert Profile.load(path) == Profile.load(str(path)) == profile
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_save_overwrites_only_when_told(tmp_path: Path, profile: Profile) -> None:
    path = tmp_path / "x.json"
    path.write_text("mine")
    with pytest.raises(ProfileError, match=r"x\.json: exists already; pass overwrite=True or"):
        profile.save(path)
    assert path.read_text() == "mine"
    profile.save(path, overwrite=True)
    assert Profile.load(path) == profile


@POSIX
def test_save_follows_links(tmp_path: Path, profile: Profile) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("old")
    profile.save(tmp_path / "link.json", overwrite=True)
    assert (tmp_path / "link.json").is_symlink()
    assert Profile.load(tmp_path / "x.json") == profile


@POSIX
def test_save_respects_the_umask(tmp_path: Path, profile: Profile) -> None:
    before = os.umask(0o027)
    try:
        profile.save(tmp_path / "x.json")
    finally:
        os.umask(before)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "denied")],
    ids=["full", "denied"],
)
def test_failed_writes_change_nothing(
    tmp_path: Path,
    profile: Profile,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    failure: OSError,
) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def fail(*args: object) -> None:
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(ProfileError) as caught:
        profile.save(path, overwrite=True)
    assert str(caught.value) == f"{path}: cannot be written ({failure.strerror})"
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_an_interrupted_write_changes_nothing(
    tmp_path: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    for step in ("link", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, interrupt)
            with pytest.raises(KeyboardInterrupt):
                profile.save(tmp_path / "x.json", overwrite=step == "replace")
        assert not list(tmp_path.iterdir())


def test_of_two_writers_the_faster_one_wins(
    tmp_path: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    monkeypatch.setattr(os, "fsync", lambda descriptor: path.write_text("of another process"))
    with pytest.raises(ProfileExistsError):
        profile.save(path)
    assert path.read_text() == "of another process"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_folders_that_cannot_be_written(tmp_path: Path, profile: Profile) -> None:
    with pytest.raises(ProfileError, match=r"no/x\.json: cannot be written \(No such file"):
        profile.save(tmp_path / "no" / "x.json")
    with pytest.raises(ProfileError, match=r"is a folder, expected a file name"):
        profile.save(tmp_path, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match=r"cannot be written \(Not a directory\)"):
        profile.save(tmp_path / "file" / "x.json")
    sealed = tmp_path / "sealed"
    sealed.mkdir(mode=0o500)
    if not os.access(sealed, os.W_OK):  # the superuser may write anywhere
        with pytest.raises(ProfileError, match=r"cannot be written \(Permission denied\)"):
            profile.save(sealed / "x.json")
