"""Weights that would take a library's memory or hours are refused before it reads them."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spark3r.errors import WeightsError
from spark3r.loading import inspection
from spark3r.loading.checkpoints import inside, read_checkpoint
from spark3r.loading.hub import parse_hub_name

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
POSIX = pytest.mark.skipif(os.name == "nt", reason="on Windows links need a right")


def archive(path: Path, content: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("a/version", b"3\n")
        file.writestr("a/data.pkl", content)
    return path


@pytest.mark.parametrize("archived", [True, False])
def test_what_torch_saves_is_read(tmp_path: Path, archived: bool) -> None:
    path = tmp_path / "x.pt"
    shared = (0.9, 0.95)
    groups = [{"betas": shared, "group": i} for i in range(200)]  # as of an optimizer
    training = {"model": TENSORS, "optimizer": {"param_groups": groups}}
    torch.save(training, path, _use_new_zipfile_serialization=archived)
    found = read_checkpoint(path)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02" + b"]" * 600_000, "a pickle of more than 500000 instructions"),
        (b"\x80\x02}N" + b"\x85" * 999 + b"Ns.", "a pickle nested more than 100 levels deep"),
        (
            b"\x80\x02}N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40)) + b"Ns.",
            "a pickle of more than 10000000 objects",
        ),
        (b"\x80\x02}N" + b"2\x86" * 40 + b"Ns.", "a pickle of more than 10000000 objects"),
        (b"\x80\x04\x8d" + b"\xff" * 8, "is not a whole PyTorch checkpoint"),
        (b"\x80\x02" + bytes(inspection.MAX_PICKLE), "holds a pickle of 8388610 bytes"),
    ],
    ids=["instructions", "levels", "doubled", "duplicated", "lengths", "bytes"],
)
def test_pickles_that_grow(tmp_path: Path, content: bytes, message: str) -> None:
    bare = tmp_path / "bare.pt"
    bare.write_bytes(content)
    paths = [archive(tmp_path / "x.pt", content)]
    if len(content) < 10_000:
        paths.append(bare)
    for path in paths:
        with pytest.raises(WeightsError, match=re.escape(message)) as caught:
            read_checkpoint(path)
        assert str(path) in str(caught.value)


def test_depth_and_size_are_those_of_the_objects() -> None:
    def refused(value: object) -> str:
        content = inspection.io.BytesIO(pickle.dumps(value, 2))
        try:
            inspection._inspect(Path("x"), content, pickles=1)
        except WeightsError as error:
            return str(error)
        return ""

    nested: object = 0
    for _ in range(inspection.MAX_DEPTH - 1):
        nested = (nested,)
    assert refused(nested) == ""
    assert "levels deep" in refused((nested,))
    assert refused({i: [i, (i, i)] for i in range(5000)}) == ""
    assert refused([[nested, nested], {"a": 1}]) != ""


def test_compressed_archives(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.save(TENSORS, whole)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(packed, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match=r"packed\.pt is a compressed archive"):
        read_checkpoint(packed)


def test_a_header_larger_than_any_models(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({f"{i} {'x' * 999}": torch.zeros(0) for i in range(1_100)}, path)
    with pytest.raises(WeightsError, match=r"lists its tensors in \d+ bytes, expected at most"):
        read_checkpoint(path)


@POSIX
def test_links_out_of_a_folder_of_weights(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    for place, target, accepted in (
        ("plain", "../elsewhere", False),
        ("plain", "/dev/zero", False),
        ("plain", "other.safetensors", True),
        ("models--a--b/snapshots/0f", "../../blobs/0e", True),
        ("models--a--b/snapshots/0f", "../../refs/0e", False),
        ("models--a--b/snapshots/0f", "../../blobs/../../elsewhere", False),
        ("models--a--b/other/0f", "../../blobs/0e", False),
    ):
        folder = tmp_path / place
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / "model.safetensors"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        if accepted:
            assert inside(folder, "model.safetensors") == link
        else:
            with pytest.raises(WeightsError, match="is a link that leads out of its folder, to /"):
                inside(folder, "model.safetensors")


@pytest.mark.parametrize(
    ("name", "matches"),
    [
        ("facebook/VGGT-1B", True),
        ("a/b/c/model_1.pt", True),
        ("a/b/c.pt@refs/pr/1", True),
        ("a/b@../x", False),
        ("a/b/../c.pt", False),
        ("a/..", False),
        ("../b", False),
        ("a//b", False),
        ("/a/b", False),
        ("a/b/.hidden", False),
    ],
)
def test_names_of_published_weights_hold_no_path(name: str, matches: bool) -> None:
    assert (parse_hub_name(name) is not None) == matches


def test_paths_that_no_file_has() -> None:
    for name in ("a\0b.pt", "x" * 5000 + ".pt"):
        with pytest.raises(WeightsError, match="there is no file"):
            read_checkpoint(Path(name))
