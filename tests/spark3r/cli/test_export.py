"""``spark3r run --export`` and ``spark3r export`` as users call them."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import run

from spark3r.cli.export import FORMATS
from spark3r.io import exports


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a rendered scene, exported to every format."""
    out = tmp_path_factory.mktemp("finished") / "out"
    answer = run(
        *("run", "--clip", "rendered:7", "--frames", "3", "--output", str(out)),
        *("--export", "colmap,nerfstudio,glb"),
    )
    assert answer.status == 0, answer.err
    assert "spark3r: exporting" in answer.err
    assert ("points have no tracks" in answer.err) == (find_spec("pycolmap") is None)
    return out


def test_cameras_that_are_no_pinhole_cameras_are_refused(finished: Path, folder: Path) -> None:
    words = ("--clip", "rendered:7", "--frames", "2", "--output", "out", "--export", "glb")
    answer = run("run", "--model", "stand_in_panovggt:PanoVggt", *words)
    assert answer.status == 1
    assert "models of family 'panovggt' predict no pinhole cameras" in answer.err
    assert not Path("out").exists()
    shutil.copytree(finished, "panorama")
    record = json.loads(Path("panorama/run.json").read_text())
    record |= {"family": "panovggt", "pinhole": False}
    Path("panorama/run.json").write_text(json.dumps(record))
    answer = run("export", "panorama", "--to", "glb", "--output", "later")
    assert answer.status == 1
    assert "panorama: models of family 'panovggt' predict no pinhole cameras" in answer.err


def test_the_names_of_formats_are_those_of_the_library() -> None:
    assert FORMATS == exports.FORMATS


def test_a_run_exports_what_it_wrote(finished: Path) -> None:
    written = finished / "export"
    assert sorted(path.name for path in written.iterdir()) == [
        "depths", "images", "points.ply", "scene.glb", "sparse", "transforms.json",
    ]  # fmt: skip
    assert sorted(path.name for path in (written / "sparse/0").iterdir()) == [
        "cameras.bin", "cameras.txt", "images.bin", "images.txt", "points3D.bin", "points3D.txt",
    ]  # fmt: skip
    assert [path.name for path in sorted((written / "images").iterdir())] == [
        f"{number:05}.png" for number in range(3)
    ]


def test_a_folder_is_exported_later(finished: Path, folder: Path) -> None:
    answer = run("export", str(finished), "--to", "glb", "--output", "later", "--json")
    assert answer.status == 0, answer.err
    assert answer.object["refinement"] is None
    assert [path.name for path in Path("later").iterdir()] == ["scene.glb"]
    assert Path("later/scene.glb").read_bytes() == (finished / "export/scene.glb").read_bytes()


def test_wrong_inputs_are_told_in_one_line_and_leave_nothing(finished: Path, folder: Path) -> None:
    def told(*arguments: str, status: int = 1) -> str:
        before = sorted(path.name for path in folder.iterdir())
        answer = run("export", *arguments)
        assert answer.status == status
        assert "Traceback" not in answer.err
        assert sorted(path.name for path in folder.iterdir()) == before
        return answer.err.splitlines()[-1]

    assert "'ply', expected some of colmap,nerfstudio,glb" in told("out", "--to", "ply", status=2)
    assert "there is no such folder" in told("nowhere", "--to", "glb")
    assert "exists already" in told(str(finished), "--to", "glb")
    shutil.copytree(finished, "copy", ignore=shutil.ignore_patterns("export"))
    record = json.loads(Path("copy/run.json").read_text())
    Path("copy/run.json").write_text(json.dumps({**record, "clip": "gone.mp4"}))
    assert "gone.mp4': there is no such file or folder" in told("copy", "--to", "colmap")
    assert "--clip says where the footage is now" in told("copy", "--to", "nerfstudio")
    Path("copy/depth/00001.npy").write_bytes(b"no array")
    assert "00001.npy cannot be read" in told("copy", "--to", "glb")
    cameras = json.loads(Path("copy/cameras.json").read_text())
    del cameras["frames"][1]["original"]
    Path("copy/cameras.json").write_text(json.dumps(cameras))
    assert "it lacks 'original'" in told("copy", "--to", "glb")
    Path("copy/cameras.json").write_text("{")
    assert "cameras.json cannot be read" in told("copy", "--to", "glb")
    if find_spec("pycolmap") is None:
        line = told(str(finished), "--to", "glb", "--refine", "--output", "new")
        assert "pip install 'spark3r[colmap]'" in line
