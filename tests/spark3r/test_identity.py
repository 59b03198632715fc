"""Fingerprints: what changes them and what does not; compatibility of a profile with a model."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Callable

import pytest
import torch
from profile_documents import Document, measured, paper
from torch import nn

from spark3r import env
from spark3r.identity import describe, fingerprint
from spark3r.loading.hub import parse_hub_name
from spark3r.loading.upstream import UPSTREAMS
from spark3r.profile import ModelRecord, Profile, compare, load_profile
from spark3r.profile.compatibility import BY_CHECKPOINT, calibrate_line


class Attention(nn.Module):
    num_heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(64, 192)
        self.proj = nn.Linear(64, 64)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(64, 3)


def attention(model: nn.Module) -> dict[str, nn.Module]:
    return {f"blocks.{index}.attn": block for index, block in enumerate(model.blocks)}  # type: ignore[arg-type]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


SAME: dict[str, Callable[[Model], nn.Module]] = {
    "copy": copy.deepcopy,
    "bfloat16": lambda model: model.bfloat16(),
    "float64": lambda model: model.double(),
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "without gradients": lambda model: model.requires_grad_(False),
    "evaluation": lambda model: model.eval(),
}


@pytest.mark.parametrize("change", SAME.values(), ids=list(SAME))
def test_what_leaves_a_fingerprint_alone(model: Model, change: Callable[[Model], Model]) -> None:
    before = fingerprint(attention(model))
    assert before is not None
    assert len(before) == 64
    assert fingerprint(attention(change(model))) == before


def test_heads_and_names_of_outer_modules_do_not_count(model: Model) -> None:
    before = fingerprint(attention(model))
    model.head = nn.Linear(1, 1)
    renamed = {f"model.{name}": module for name, module in attention(model).items()}
    assert fingerprint(renamed) == before


def test_wrapped_layers_have_the_same_fingerprint(model: Model) -> None:
    before = fingerprint(attention(model))
    compiled = {
        name: torch.compile(module, backend="eager") for name, module in attention(model).items()
    }
    assert fingerprint(compiled) == before
    for block in model.blocks:
        block.qkv = nn.DataParallel(block.qkv)  # type: ignore[assignment]
    assert fingerprint(attention(model)) == before


def test_what_changes_a_fingerprint(model: Model) -> None:
    before = fingerprint(attention(model))
    swapped = dict(reversed(attention(model).items()))
    assert fingerprint(swapped) != before
    assert fingerprint({"blocks.0.attn": model.blocks[0]}) != before
    assert fingerprint(attention(copy.deepcopy(model).half())) != before  # rounds on its own
    with torch.no_grad():
        model.blocks[1].proj.bias[5] += 0.5  # type: ignore[index, operator]
    assert fingerprint(attention(model)) != before


def test_shapes_count(model: Model) -> None:
    before = fingerprint(attention(model))
    for block in model.blocks:
        weight = block.qkv.weight
        block.qkv.weight = nn.Parameter(weight.detach().reshape(96, 128))  # type: ignore[union-attr]
    assert fingerprint(attention(model)) != before


def test_no_values_no_fingerprint(model: Model) -> None:
    record = describe("vggt", attention(model.to("meta")), {})
    assert record.fingerprint is None
    assert record.width == 64


def test_parameters_that_are_not_floating_point() -> None:
    class Quantised(nn.Module):
        def __init__(self, value: int) -> None:
            super().__init__()
            weight = torch.full((2, 2), value, dtype=torch.int8)
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.scale = nn.Parameter(torch.tensor(0.5))  # of no dimension
            self.empty = nn.Parameter(torch.zeros(0, 3))

    assert fingerprint({"a": Quantised(3)}) != fingerprint({"a": Quantised(4)})


def test_describe(model: Model) -> None:
    record = describe(
        "vggt", attention(model), {"patch_size": 14, "special_tokens": 5}, weights="a/b"
    )
    assert record == ModelRecord(
        family="vggt",
        name="vggt",
        weights="a/b",
        width=64,
        heads=4,
        patch_size=14,
        special_tokens=5,
        fingerprint=fingerprint(attention(model)),
        global_layers=("blocks.0.attn", "blocks.1.attn"),
    )


def parse(document: Document) -> Profile:
    return Profile.parse(json.dumps(document))


def record_of(profile: Profile, **changes: object) -> ModelRecord:
    return profile.model.model_copy(update=changes)


def test_mismatches_are_errors() -> None:
    profile = parse(measured())
    cases: dict[str, dict[str, object]] = {
        "the profile is for family 'vggt', the model's is 'pi3'": {"family": "pi3"},
        "the profile is for 2 global layers (Small), the model has 1": {
            "global_layers": ("blocks.0.attn",)
        },
        "global layer 1 of the profile is 'blocks.1.attn', the model's is 'blocks.2.attn'": {
            "global_layers": ("blocks.0.attn", "blocks.2.attn")
        },
        "global layer 0 of the profile is 'blocks.0.attn', the model's is 'xblocks.0.attn'": {
            "global_layers": ("xblocks.0.attn", "xblocks.1.attn")
        },
        "global layer 1 of the profile is 'blocks.1.attn', the model's is 'b.blocks.1.attn'": {
            "global_layers": ("blocks.0.attn", "b.blocks.1.attn")
        },
    }
    for message, changes in cases.items():
        fit = compare(profile, record_of(profile, **changes), device="cpu")
        assert fit.errors == (message,)
        assert fit.warnings == ()


def test_one_outer_module_is_no_mismatch() -> None:
    profile = parse(measured())
    outer = ("model.da3.blocks.0.attn", "model.da3.blocks.1.attn")
    record = record_of(profile, global_layers=outer)
    assert compare(profile, record).errors == ()
    inner = parse(json.loads(json.dumps(measured()).replace('"blocks.', '"model.blocks.')))
    assert compare(inner, profile.model).errors == ()


def test_evidence_from_elsewhere_is_a_warning() -> None:
    document = measured()
    document["measurements"][0].update(device=env.cpu_name(), dtype="float32")
    profile = parse(document)
    same = compare(
        profile, profile.model, device="cpu", dtype=torch.float32, frames=48, grid=(8, 10)
    )
    assert same.errors == same.warnings == ()
    other = compare(
        profile,
        record_of(profile, fingerprint="cd" * 32, width=32),
        device=torch.device("meta"),
        dtype=torch.bfloat16,
        frames=49,
        grid=(9, 10),
    )
    assert other.errors == ()
    assert other.warnings == (
        "the profile is for Small: width 64, the model's 32",
        "the profile was measured on other weights (fingerprint abababababab, yours "
        "cdcdcdcdcdcd); `calibrate --model vggt:WEIGHTS --budget 50%` (WEIGHTS: your checkpoint) "
        "measures one on yours",
        f"the profile was measured on {env.cpu_name()}, the model is on meta",
        "the profile was measured in float32, the model runs in bfloat16",
        "the profile was measured on grids of 8x10, the clip's is 9x10",
        "the profile was measured on clips of up to 48 frames, this one has 49",
    )
    unknown = compare(profile, record_of(profile, fingerprint=None, width=None))
    assert unknown.warnings == ()


def test_other_operators_are_a_warning() -> None:
    document = paper()
    document["schedules"][0]["operators"]["revision"] = 99
    profile = parse(document)
    warnings = compare(profile, profile.model).warnings
    assert warnings[0].startswith("the profile was made with operators of revision 99, this spark3")


def test_choices_beyond_attention_are_a_warning() -> None:
    document = paper()
    document["schedules"][0]["execution"] = {
        "weights_dtype": "bfloat16",
        "heads": ["depth", "camera"],
        "compiled": ["frame_blocks"],
    }
    profile = parse(document)
    assert compare(profile, profile.model).warnings[0] == (
        "schedule 'fast' is for a model with weights in bfloat16, only the heads depth and camera, "
        "compiled frame_blocks; spark3r changes only attention, so make these choices yourself or "
        "expect another latency and quality"
    )
    document["schedules"][0]["execution"] = {"heads": []}
    assert parse(document).schedules[0].execution.describe() == "no heads"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vggt-1b", "a paper's schedule"),
        ("da3-large", "a rule of thumb"),
    ],
)
def test_profiles_that_were_not_measured_say_so(name: str, said: str) -> None:
    profile = load_profile(name)
    (warning,) = compare(profile, profile.model, device="cpu", dtype="float32").warnings
    assert warning == (
        f"the profile is {said} and was not measured on your weights; `calibrate --model "
        f"{profile.model.family}:WEIGHTS --budget 50%` (WEIGHTS: your checkpoint) measures one"
    )


@pytest.mark.parametrize(
    ("family", "name", "model"),
    [
        ("vggt", "vggt:/data/my model.pt", ["vggt:/data/my model.pt"]),
        ("vggt", "mine.models:make", ["mine.models:make"]),
        ("reference", "reference:random", ["reference:random"]),
        ("omega", None, ["omega:WEIGHTS"]),
        ("reference", None, ["PACKAGE.MODULE:FACTORY"]),
        ("of my own", None, ["PACKAGE.MODULE:FACTORY"]),
    ],
)
def test_the_command_that_measures_a_profile_can_be_pasted(
    family: str, name: str | None, model: list[str]
) -> None:
    line = calibrate_line(family, name)
    assert shlex.split(line.split("`")[1]) == ["calibrate", "--model", *model, "--budget", "50%"]
    assert line.endswith("`") == (name is not None)  # a placeholder is explained


def test_families_by_checkpoint_are_those_that_can_be_loaded() -> None:
    assert set(BY_CHECKPOINT) == set(UPSTREAMS)


@pytest.mark.parametrize(
    "name", ["da3-giant", "da3-large", "pi3", "pi3x", "vggt-1b", "vggt-omega-1b"]
)
def test_shipped_weights_can_be_named_to_calibrate(name: str) -> None:
    weights = load_profile(name).model.weights
    assert weights is not None
    assert parse_hub_name(weights)


def test_reasons_do_not_steer_a_terminal() -> None:
    profile = load_profile("vggt-1b")
    evil = "\x1b[2J"
    named = profile.model.model_copy(update={"name": evil})
    other = profile.model_copy(update={"model": named})
    (error,) = compare(other, record_of(profile, global_layers=("x",))).errors
    warnings = compare(other, record_of(profile, width=1)).warnings
    for reason in (error, *warnings):
        assert evil not in reason
    assert "(\\x1b[2J)" in error
