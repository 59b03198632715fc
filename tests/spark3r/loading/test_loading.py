"""Models by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from spark3r import FamilyError, Spark3rError, WeightsError
from spark3r.loading.load import load_model
from spark3r.reference import ReferenceModel, weights

FACTORIES = """
import torch

def make():
    return torch.nn.Linear(2, 2)

class Zoo:
    make = staticmethod(make)

def nothing():
    return None

def broken():
    raise RuntimeError("no such GPU")

model = torch.nn.Linear(2, 2)
number = 3
"""


@pytest.fixture(autouse=True)
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(FACTORIES)
    (tmp_path / "needy.py").write_text("import not_installed_anywhere")
    (tmp_path / "wrong.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_models", "needy", "wrong"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_reference() -> None:
    before = torch.random.get_rng_state()
    model = load_model("reference:random")
    assert isinstance(model, ReferenceModel)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(torch.random.get_rng_state(), before)


def test_reference_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHIPPED_WEIGHTS", tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="its trained weights are not installed; 'reference:ra"):
        load_model("reference")


@pytest.mark.parametrize("name", ["my_models:make", "my_models:Zoo.make"])
def test_factories(name: str) -> None:
    model = load_model(name, device="meta")
    assert isinstance(model, torch.nn.Linear)
    assert not model.training
    assert model.weight.is_meta


ACCEPTED = "expected 'reference' (the small trained model"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", f"no model is called '', {ACCEPTED}"),
        ("nope", f"no model is called 'nope', {ACCEPTED}"),
        ("reference:trained", f"no model is called 'reference:trained', {ACCEPTED}"),
        ("dust3r:naver/DUSt3R", f"no model is called 'dust3r:naver/DUSt3R', {ACCEPTED}"),
        ("weights.pt", "no model is called 'weights.pt': name the family of these weights too, s"),
        ("no-such:f", f"no model is called 'no-such:f', {ACCEPTED}"),
        ("my_models:", f"no model is called 'my_models:', {ACCEPTED}"),
        ("my_models:make()", f"no model is called 'my_models:make()', {ACCEPTED}"),
        ("nowhere:f", "model 'nowhere:f': there is no module 'nowhere' on the Python path; expec"),
        ("my_models.sub:f", "model 'my_models.sub:f': there is no module 'my_models.sub' on the "),
        (
            "needy:f",
            "model 'needy:f': module 'needy' needs 'not_installed_anywhere', which is missing",
        ),
        ("wrong:f", "model 'wrong:f': importing wrong raised ZeroDivisionError: division by zero"),
        ("my_models:absent", "model 'my_models:absent': module 'my_models' has no 'absent'"),
        ("my_models:Zoo.no", "model 'my_models:Zoo.no': module 'my_models' has no 'Zoo.no'"),
        (
            "my_models:nothing",
            "model 'my_models:nothing': nothing() returned None, expected a torch.nn.Module",
        ),
        (
            "my_models:broken",
            "model 'my_models:broken': broken() raised RuntimeError: no such GPU",
        ),
        ("my_models:model", "model 'my_models:model': 'model' is an object of type Linear, expec"),
        ("my_models:number", "model 'my_models:number': 'number' is an object of type int, expec"),
    ],
)
def test_names_that_give_no_model(name: str, message: str) -> None:
    with pytest.raises(FamilyError) as caught:
        load_model(name)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, Spark3rError)
