"""``spark3r verify``: one file of evidence, which names no path, host or user."""

from __future__ import annotations

import getpass
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from command_line import run
from small_models import make_model
from stand_in_parts import VggtAttention
from torch import Tensor, nn

import spark3r
from spark3r.clips import Clip
from spark3r.evidence import verify_model
from spark3r.runner import Runner


def tiny() -> nn.Module:
    return make_model()


class Gated(VggtAttention):
    """Attention of a fork that has the same names and computes something else."""

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        return self.run(x, pos) * torch.sigmoid(x)


def fork() -> nn.Module:
    torch.manual_seed(0)
    return stand_ins.Vggt(Gated)


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "models_to_verify", sys.modules[__name__])


FAST = ("--frames", "3", "--rounds", "1", "--schedule", "uniform:2:2", "--device", "cpu")


def test_the_file_says_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    words = ("verify", "--model", "models_to_verify:tiny", *FAST, "--output", str(path))
    answer = run(*words)
    assert answer.status == 0, answer.err
    assert "factors of 1 in spark3r's own code: the same bit for bit" in answer.out
    assert "deviation of uniform:2:2 from dense: depth" in answer.out
    text = path.read_text(encoding="utf-8")
    found = json.loads(text)
    assert (found["format"], found["version"]) == ("spark3r-evidence", 1)
    assert found["clip"] == {"kind": "rendered:7", "frames": 3, "height": 64, "width": 64}
    assert found["exactness"] == {"ones": 0.0, "forced": 0.0, "removed": 0.0}
    assert found["guard"] is None
    assert set(found["passes"]) == {"dense", "uniform:2:2"}
    assert all(each["ms"] > 0 and each["n"] >= 1 for each in found["passes"].values())
    assert found["deviation"]["depth"] > 0
    assert "kernels" in found["environment"]
    names = {socket.gethostname(), str(tmp_path), str(Path.cwd()), str(Path.home()) + "/"}
    assert not [name for name in names if name in text]
    assert f'"{getpass.getuser()}"' not in text
    again = run(*words)
    assert (again.status, again.err.count("\n")) == (1, 1)
    assert "exists: choose another name" in again.err


def test_footage_and_files_of_weights_are_not_named(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "private footage"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 40, 90)).save(folder / f"secret {number}.png")
    words = ("verify", "--model", "models_to_verify:tiny", "--clip", str(folder), *FAST, "--json")
    answer = run(*words)
    assert answer.status == 0, answer.err
    assert answer.object["clip"]["kind"] == "footage"
    assert "secret" not in answer.out
    assert "private" not in answer.out


def test_a_model_that_only_looks_like_its_family(tmp_path: Path) -> None:
    answer = run("verify", "--model", "models_to_verify:fork", *FAST, "--json")
    assert answer.status == 1
    assert "does not compute what the vggt family computes" in answer.object["guard"]
    assert answer.object["exactness"]["forced"] > 1e-3
    assert answer.object["exactness"]["ones"] == answer.object["exactness"]["removed"] == 0.0


def test_a_dense_pass_that_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    attention = type(model.get_submodule("aggregator.global_blocks.0.attn"))
    forward = attention.forward

    def lacking(self: Any, x: Tensor, *rest: Any) -> Tensor:
        if x.shape[1] > 6 * 6 * 4:
            raise MemoryError
        return forward(self, x, *rest)

    monkeypatch.setattr(
        type(model.get_submodule("aggregator.global_blocks.0.attn")), "forward", lacking
    )
    clip = Clip("seven", torch.rand(7, 3, 32, 32))
    found = verify_model(Runner.of(model), clip, "uniform:2:2", rounds=1)
    assert list(found.passes) == ["uniform:2:2"]
    assert (found.deviation, found.notes) == (None, ("dense: out of memory",))
    assert found.holds


def test_evidence_that_was_sent_in_has_the_form_of_today() -> None:
    written = run("verify", "--model", "models_to_verify:tiny", *FAST, "--json").object
    for path in sorted((Path(spark3r.__file__).parents[1] / "profiles/evidence").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert (found["format"], found["version"]) == ("spark3r-evidence", 1), path.name
        assert set(found) == set(written), path.name
