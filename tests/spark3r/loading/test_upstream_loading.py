"""Loading by name: the models' own packages, checkpoints, Hugging Face, and what can go wrong."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import command_line
import pytest
import stand_ins
import torch
from family_cases import ALL_CASES, missing
from safetensors.torch import save_file
from torch import nn

import spark3r
from spark3r import FamilyError, WeightsError
from spark3r.geometry import invert_pose
from spark3r.identity import Origin, origin_of
from spark3r.loading.checkpoints import read_checkpoint
from spark3r.loading.load import about, load_model
from spark3r.loading.upstream import UPSTREAMS, InstalledCode, installed_code
from spark3r.runner import Runner


def put_package(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    """Put a module, and the packages it is in, where imports find them."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:depth]))
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(content)


@pytest.fixture
def vggt_code(monkeypatch: pytest.MonkeyPatch) -> None:
    put_package(monkeypatch, "vggt.models.vggt", VGGT=lambda enable_track: stand_ins.Vggt())


def weights(path: Path, model: nn.Module, prefix: str = "") -> dict[str, Any]:
    tensors = {prefix + name: value.clone() for name, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return tensors


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
def test_a_checkpoint_is_loaded(suffix: str, prefix: str, vggt_code: None, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    saved = weights(path, stand_ins.Vggt(), prefix)
    for name in (
        (f"vggt:{path}", f"vggt:{tmp_path}") if suffix == ".safetensors" else (f"vggt:{path}",)
    ):
        model = load_model(name)
        assert not model.training
        for key, value in model.state_dict().items():
            assert torch.equal(value, saved[prefix + key])


def test_cameras_of_lingbots_checkpoint_are_turned(vggt_code: None, tmp_path: Path) -> None:
    weights(tmp_path / "lingbot-map-stage1.pt", stand_ins.Vggt())
    shutil.copy(tmp_path / "lingbot-map-stage1.pt", tmp_path / "other.pt")
    clip = torch.rand(3, 3, 28, 42)
    found = []
    for name in ("lingbot-map-stage1", "other"):
        runner = Runner.of(load_model(f"vggt:{tmp_path / name}.pt"))
        found.append(runner.predict(spark3r.Clip("clip", clip)))
    lingbot, vggt = found
    assert torch.allclose(lingbot.extrinsics, invert_pose(vggt.extrinsics), atol=1e-5)
    assert torch.equal(lingbot.depth, vggt.depth)
    assert torch.allclose(lingbot.intrinsics, vggt.intrinsics)


def test_a_training_checkpoint_is_looked_into(vggt_code: None, tmp_path: Path) -> None:
    original = stand_ins.Vggt()
    torch.save({"epoch": 3, "state_dict": original.state_dict()}, tmp_path / "last.ckpt")
    model = load_model(f"vggt:{tmp_path / 'last.ckpt'}")
    assert torch.equal(
        model.state_dict()["aggregator.camera_token"], original.aggregator.camera_token
    )


def test_parts_that_are_not_built_are_passed_over(vggt_code: None, tmp_path: Path) -> None:
    tensors = {**stand_ins.Vggt().state_dict(), "track_head.norm.weight": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_model(f"vggt:{tmp_path}") is not None


def test_random_weights_are_the_same_every_time(vggt_code: None) -> None:
    before = torch.random.get_rng_state()
    first, second = load_model("vggt:random"), load_model("vggt:random-1b")
    assert torch.equal(torch.random.get_rng_state(), before)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_another_size(vggt_code: None, tmp_path: Path) -> None:
    tensors = stand_ins.Vggt().state_dict()
    tensors["aggregator.camera_token"] = torch.zeros(1, 2, 1, 7)
    tensors["aggregator.extra"] = torch.zeros(1)
    del tensors["aggregator.register_token"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_model(f"vggt:{tmp_path}")
    told = str(caught.value)
    assert "1 missing (aggregator.register_token)" in told
    assert "1 unknown (aggregator.extra)" in told
    assert "1 of another shape (aggregator.camera_token [1, 2, 1, 7] for " in told
    assert told.endswith("it is a checkpoint of another version or size")


def test_a_checkpoint_of_another_architecture(vggt_code: None, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights(path, stand_ins.Pi3())
    with pytest.raises(WeightsError, match=r"not a checkpoint of VGGT; it looks like .* of π³: t"):
        load_model(f"vggt:{path}")
    weights(path, nn.Linear(2, 2))
    with pytest.raises(WeightsError, match="not a checkpoint of VGGT; its tensors are named bias"):
        load_model(f"vggt:{path}")


def test_a_metric_depth_anything_has_nothing_to_reduce(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_package(monkeypatch, "depth_anything_3.model.da3")
    tensors = {"model.backbone.pretrained.cls_token": torch.zeros(1, 1, 1024)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="it is a metric or monocular Depth-Anything-3"):
        load_model(f"da3:{tmp_path}")


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/spark3r-was-here",))


def pickled_code(path: Path) -> None:
    torch.save({"weight": torch.ones(2), "rest": RunsCode()}, path)


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(RunsCode()))


def cut_checkpoint(path: Path) -> None:
    weights(path, nn.Linear(300, 300))
    path.write_bytes(path.read_bytes()[:-5000])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("code.pt", pickled_code, "holds more than tensors: reading it would run code of its auth"),
        ("bare.pt", bare_pickle, "holds more than tensors: reading it would run code"),
        ("cut.pt", cut_checkpoint, "is not a whole PyTorch checkpoint ("),
        ("cut.safetensors", cut_checkpoint, "is not a whole safetensors file ("),
        ("text.pt", lambda p: p.write_text("hello"), "is not a PyTorch checkpoint"),
        ("empty.pt", lambda p: p.write_text(""), "is not a PyTorch checkpoint"),
        ("text.safetensors", lambda p: p.write_text("hello"), "is not a whole safetensors file ("),
        ("list.pt", lambda p: torch.save([torch.ones(1)], p), "holds an object of type list, exp"),
        ("none.pt", lambda p: torch.save({"epoch": 3}, p), "holds no named tensors (it holds ep"),
        ("weights.npz", lambda p: p.write_text(""), "is not a checkpoint: expected one of .safe"),
        ("absent.pt", lambda p: None, "there is no file"),
    ],
)
def test_files_that_are_not_checkpoints(name: str, make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    with pytest.raises(WeightsError) as caught:
        read_checkpoint(tmp_path / name)
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert not Path("/tmp/spark3r-was-here").exists()


def forget(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Take a package off the imported modules; other tests may have imported the real one."""
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("family", UPSTREAMS)
def test_missing_code_is_named_with_its_licence(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    upstream = UPSTREAMS[family]
    package = upstream.entry.partition(".")[0]
    forget(monkeypatch, package)
    monkeypatch.setitem(sys.modules, package, None)
    for rest in ("random", upstream.example, str(tmp_path)):
        with pytest.raises(FamilyError) as caught:
            load_model(f"{family}:{rest}")
        told = str(caught.value)
        assert told.startswith(f"model '{family}:{rest}': the code of {upstream.title} is not inst")
        assert f"Install it with: {upstream.install} (licence of the code: " in told
        assert f"weights {upstream.example}: " in told
        assert told.endswith(f": {upstream.example_licence})")


def test_code_that_needs_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, "vggt")
    monkeypatch.setitem(sys.modules, "vggt", types.ModuleType("vggt"))
    vars(sys.modules["vggt"])["__path__"] = []

    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.startswith("vggt."):
                raise ModuleNotFoundError("No module named 'einops'", name="einops")

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(FamilyError, match="the code of VGGT needs 'einops'"):
        load_model("vggt:random")


def test_code_with_another_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Merging(stand_ins.VggtAttention):
        def forward(self, x: Any, pos: Any = None, global_merging: Any = None) -> Any:
            return super().forward(x, pos)

    put_package(monkeypatch, "vggt.models.vggt", VGGT=lambda enable_track: stand_ins.Vggt(Merging))
    with pytest.raises(FamilyError, match=r"^model 'vggt:random': .*this is FastVGGT, which merge"):
        load_model("vggt:random")


def test_code_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    put_package(monkeypatch, "vggt.models.vggt", VGGT=stand_ins.Vggt)
    with pytest.raises(FamilyError, match=r"building VGGT raised TypeError: .*enable_track.*versi"):
        load_model("vggt:random")


class EntryNotFoundError(Exception):
    pass


class LocalEntryNotFoundError(EntryNotFoundError):
    pass


def put_hub(monkeypatch: pytest.MonkeyPatch, files: dict[str, Path], online: bool = True) -> None:
    """Put a Hugging Face of our own in place: it has these files and nothing else."""

    def hf_hub_download(repository: str, file: str, revision: str | None = None) -> str:
        if not online:
            raise LocalEntryNotFoundError("cannot find it in the cache, and there is no network")
        name = f"{repository}/{file}" + (f"@{revision}" if revision else "")
        if name not in files:
            raise EntryNotFoundError(f"404: {file}")
        return str(files[name])

    errors = {"EntryNotFoundError": EntryNotFoundError}
    errors["LocalEntryNotFoundError"] = LocalEntryNotFoundError
    put_package(monkeypatch, "huggingface_hub.errors", **errors)
    listed = [name.split("/", 2)[2].partition("@")[0] for name in files]
    hub = sys.modules["huggingface_hub"]
    vars(hub).update(
        hf_hub_download=hf_hub_download, list_repo_files=lambda name, revision=None: listed
    )


def test_weights_from_hugging_face(
    vggt_code: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    token = weights(path, stand_ins.Vggt())["aggregator.camera_token"]
    weights(tmp_path / "other.pt", stand_ins.Vggt())
    for files, name in (
        ({"facebook/VGGT-1B/model.safetensors": path}, "facebook/VGGT-1B"),
        ({"facebook/VGGT-1B/weights.safetensors": path}, "facebook/VGGT-1B"),
        (
            {"a/b/one.pt": tmp_path / "other.pt", "a/b/x/two.safetensors": path},
            "a/b/x/two.safetensors",
        ),
        (
            {
                "a/b/model.safetensors@v2.0": path,
                "a/b/model.safetensors": tmp_path / "other.pt",
            },
            "a/b@v2.0",
        ),
        ({"a/b/x/one.safetensors@refs/pr/1": path}, "a/b/x/one.safetensors@refs/pr/1"),
        ({"a/b/one.safetensors@v2.0": path}, "a/b@v2.0"),
    ):
        put_hub(monkeypatch, files)
        model = load_model(f"vggt:{name}")
        assert torch.equal(model.state_dict()["aggregator.camera_token"], token)


def test_the_commit_of_weights_from_hugging_face_is_known(
    vggt_code: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = "860abec7937da0a4c03c41d3c269c366e82abdf9"
    cached = tmp_path / f"models--a--b/snapshots/{commit}/model.safetensors"
    cached.parent.mkdir(parents=True)
    weights(cached, stand_ins.Vggt())
    put_hub(monkeypatch, {"a/b/model.safetensors@main": cached})
    model = load_model("vggt:a/b@main")
    assert origin_of(model) == Origin("vggt:a/b@main", cached, commit)
    model = load_model(f"vggt:{cached}")
    assert origin_of(model) == Origin(f"vggt:{cached}", cached, commit)
    assert origin_of(load_model("vggt:random")) == Origin("vggt:random")


@pytest.mark.parametrize(
    ("record", "commit"),
    [
        ('{"url": "u", "vcs_info": {"vcs": "git", "commit_id": "44b3afbd"}}', "44b3afbd"),
        ('{"url": "file:///u", "dir_info": {"editable": true}}', None),
        (None, None),
        ("{", None),
        ("[]", None),
    ],
)
def test_the_commit_of_installed_code_is_known(
    record: str | None, commit: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The files are those that pip writes (PEP 610)."""
    info = tmp_path / "some_vggt-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-vggt\nVersion: 0.0.1\n")
    if record is not None:
        (info / "direct_url.json").write_text(record)
    monkeypatch.syspath_prepend(tmp_path)
    found = installed_code("some-vggt", "some_vggt", "vggt")
    assert found == InstalledCode("some-vggt", "0.0.1", commit)
    assert installed_code("no-such", "no_such", "vggt") == InstalledCode("no-such")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_of_a_clone_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.org")
        answer = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *words], capture_output=True, text=True, check=True
        )
        return answer.stdout.strip()

    (tmp_path / "cloned_vggt").mkdir()
    code = tmp_path / "cloned_vggt" / "__init__.py"
    code.write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    git("tag", "v1.0")
    commit = git("rev-parse", "HEAD")
    monkeypatch.syspath_prepend(tmp_path)

    def known() -> str | None:
        return installed_code("cloned-vggt", "cloned_vggt", "vggt").commit

    assert known() is None  # of whose repository?
    git("remote", "add", "origin", "https://github.com/a/my-project")
    assert known() is None
    for url in ("https://github.com/facebookresearch/vggt", "git@github.com:a/vggt.git"):
        git("remote", "set-url", "origin", url)
        assert known() == commit
    code.write_text("changed = True")
    assert known() == f"{commit}-dirty"


@pytest.mark.parametrize("family", UPSTREAMS)
def test_install_hints_are_those_of_the_pages_and_pin_what_was_checked(family: str) -> None:
    install = UPSTREAMS[family].install
    assert re.search(r"@[0-9a-f]{40}|==|checkout [0-9a-f]{40}", install)
    assert re.fullmatch(r"[0-9a-f]{40}|[0-9.]+", UPSTREAMS[family].checked)
    page = Path(spark3r.__file__).parents[1] / f"docs/families/{family}.md"
    assert install in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "online", "name", "message"),
    [
        ({}, False, "a/b", "from Hugging Face failed (LocalEntryNotFoundError: cannot find it"),
        ({}, True, "a/b/c.pt", "from Hugging Face failed (EntryNotFoundError: 404: c.pt)"),
        (
            {"a/b/x.md": Path()},
            True,
            "a/b",
            "has no model.safetensors; of other checkpoints it has none",
        ),
        (
            {"a/b/x.pt": Path(), "a/b/y.pt": Path()},
            True,
            "a/b",
            "'a/b' has no model.safetensors; of other checkpoints it has several (x.pt, y.pt)",
        ),
    ],
)
def test_downloads_that_fail(
    files: dict[str, Path],
    online: bool,
    name: str,
    message: str,
    vggt_code: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_hub(monkeypatch, files, online)
    with pytest.raises(WeightsError) as caught:
        load_model(f"vggt:{name}")
    assert message in str(caught.value)


def test_weights_from_hugging_face_need_its_package(
    vggt_code: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match="huggingface_hub, which is missing: pip install hugg"):
        load_model("vggt:facebook/VGGT-1B")


@pytest.mark.parametrize("rest", ["", "nonsense", "weights.pt", "./a/b.pt", "/a/b.pt", "~/b"])
def test_names_without_weights(rest: str, vggt_code: None) -> None:
    with pytest.raises((WeightsError, FamilyError)) as caught:
        load_model(f"vggt:{rest}")
    assert str(caught.value).startswith(f"model 'vggt:{rest}': ")


def test_a_variant_that_does_not_exist() -> None:
    with pytest.raises(FamilyError, match="no variant 'tiny' of Depth-Anything-3, expected da3:ra"):
        load_model("da3:random-tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vggt", "model 'vggt': expected vggt:facebook/VGGT-1B, the path of a checkpoint, or vgg"),
        ("omega:", "model 'omega:': expected omega:facebook/VGGT-Omega/vggt_omega_1b_512.pt, "),
        ("VGGT:a/b.pt", "model 'VGGT:a/b.pt': expected vggt:a/b.pt"),
        ("facebook/VGGT-1B", "name the family of these weights too, such as vggt:facebook/VGGT-1B"),
    ],
)
def test_a_name_of_which_a_part_is_missing(name: str, message: str) -> None:
    with pytest.raises(FamilyError) as caught:
        load_model(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "weights_field", "random", "notice"),
    [
        ("reference", "reference", False, ""),
        ("reference:random", "random", True, "random weights: its time and memory are meaningful"),
        ("da3:random-small", "random", True, "random weights"),
        ("vggt:facebook/VGGT-1B", "facebook/VGGT-1B", False, "weights facebook/VGGT-1B: non-comm"),
        (
            "vggt:facebook/VGGT-1B-Commercial",
            "facebook/VGGT-1B-Commercial",
            False,
            "commercial use allowed under the VGGT License, gated",
        ),
        ("da3:depth-anything/DA3-BASE", "depth-anything/DA3-BASE", False, "DA3-BASE: Apache-2.0"),
        ("da3:depth-anything/DA3-LARGE-1.1", "depth-anything/DA3-LARGE-1.1", False, "CC BY-NC 4.0"),
        ("omega:weights.pt", "weights.pt", False, "weights weights.pt: under their own terms"),
        ("vggt:facebook/VGGT-1B@main", "facebook/VGGT-1B@main", False, "1B@main: non-commercial"),
        ("vggt:a/VGGT-1B", "a/VGGT-1B", False, "see https://huggingface.co/a/VGGT-1B"),
        ("da3:a/DA3-BASE", "a/DA3-BASE", False, "see https://huggingface.co/a/DA3-BASE"),
        ("vggt:", "vggt:", False, ""),
        ("my_models:make", "my_models:make", False, ""),
    ],
)
def test_weights_and_notice_of_a_name(
    name: str, weights_field: str, random: bool, notice: str
) -> None:
    told = about(name)
    assert (told.weights, told.random) == (weights_field, random)
    assert notice in told.notice
    assert bool(told.notice) == bool(notice)


REAL_DA3 = next(case for case in ALL_CASES if case.name == "da3-small-upstream")


@pytest.mark.skipif(
    bool(missing(REAL_DA3)), reason="NOT VERIFIED: depth-anything-3 is not installed"
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_checkpoint_of_the_real_depth_anything_3(suffix: str, tmp_path: Path) -> None:
    model = load_model("da3:random-small")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # not what building it gives
    path = tmp_path / f"model{suffix}"
    weights(path, model, "model.")  # as its API object names them
    loaded = load_model(f"da3:{path}")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.slow
def test_published_weights_are_verified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = next(case for case in ALL_CASES if case.name == "da3-small-upstream")
    if missing(case):
        pytest.skip("NOT VERIFIED: depth-anything-3 is not installed")
    path = tmp_path / "model.safetensors"
    weights(path, UPSTREAMS["da3"].random("small"), "model.")
    put_hub(monkeypatch, {"depth-anything/DA3-SMALL/model.safetensors": path})
    words = ("--model", "da3:depth-anything/DA3-SMALL", "--frames", "3", "--rounds", "1", "--json")
    answer = command_line.run("verify", *words)
    assert answer.status == 0, answer.err
    found = answer.object
    assert found["model"]["name"] == "da3:depth-anything/DA3-SMALL"
    assert found["model"]["licence"] == "Apache-2.0"
    assert found["exactness"] == {"ones": 0.0, "forced": 0.0, "removed": 0.0}
    assert (found["guard"], found["notes"]) == (None, [])
    assert found["code"]["package"] == "depth-anything-3"
    assert str(tmp_path) not in answer.out
