"""Steps past the wall: without merged queries nothing changes, and merged updates equal a loop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import stand_ins
import torch
import torch._dynamo
from benchmark_scripts import script
from small_models import make_images, make_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import spark3r
from spark3r import Schedule
from spark3r.reduction import merging
from spark3r.runner import Runner

STEPS = ("compiled", "head", "merged")


@pytest.fixture
def past_the_wall(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    torch._dynamo.reset()
    yield script(monkeypatch, "past_the_wall")
    torch._dynamo.reset()


def depth(model: nn.Module, images: Tensor) -> Tensor:
    return Runner.of(model).run(images)["depth"]


@pytest.mark.parametrize("kind", ["reference", "vggt"])
@pytest.mark.parametrize("key_value", [1, 2])
def test_where_no_query_is_merged_nothing_changes(
    past_the_wall: ModuleType, kind: str, key_value: int
) -> None:
    model = make_model() if kind == "reference" else stand_ins.Vggt().eval()
    images = make_images(4) if kind == "reference" else make_images(4, 28, 42)
    step = past_the_wall.steps(Runner.of(model), backend="eager")[0]["merged"]
    layers = len(spark3r.families.detect(model).attention(model))
    with spark3r.apply(model, Schedule.uniform(layers, 1, key_value)):
        before = Runner.of(model).run(images)
        with step():
            after = Runner.of(model).run(images)
    for name in ("depth", "pose_enc"):
        assert torch.equal(before[name], after[name])


def test_merged_tokens_share_one_update(past_the_wall: ModuleType, monkeypatch: Any) -> None:
    model = make_model(pairs=1)
    block = model.aggregator.global_blocks[0]  # type: ignore[union-attr,index]
    passes: list[tuple[Tensor, Tensor]] = []
    attended: list[Tensor] = []
    places: list[Tensor] = []
    matched = merging.match
    monkeypatch.setattr(merging, "match", lambda *args: places.append(matched(*args)) or places[-1])
    block.register_forward_hook(lambda _, args, output: passes.append((args[0], output)))
    block.attn.register_forward_hook(lambda _, args, output: attended.append(output))
    step = past_the_wall.steps(Runner.of(model), backend="eager")[0]["merged"]
    with spark3r.apply(model, Schedule.uniform(1, 4, 2)):
        Runner.of(model).run(make_images(4))
        with step():
            Runner.of(model).run(make_images(4))
    assert torch.equal(places[0], places[1])
    (x, plain), (again, found) = passes
    assert torch.equal(x, again)
    length = int(places[0].max()) + 1
    assert attended[1].shape[1] == length < attended[0].shape[1] == x.shape[1]
    with torch.inference_mode():
        for place in range(length):
            members = (places[0][0] == place).nonzero().squeeze(1)
            mean = x[0, members].mean(dim=0)
            update = block.ls1(attended[0][0, members[0]])
            update = update + block.ls2(block.mlp(block.norm2(mean + update)))
            torch.testing.assert_close(found[0, members], x[0, members] + update)
    assert not torch.allclose(found, plain)


def test_a_depth_head_in_float32_is_the_same(past_the_wall: ModuleType) -> None:
    model, images = make_model(), make_images(3)
    steps, _ = past_the_wall.steps(Runner.of(model), backend="eager", head_dtype=torch.float32)
    step = steps["head"]
    before = depth(model, images)
    with step():
        weight = model.depth_head.conv_half.weight  # type: ignore[union-attr]
        assert weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(depth(model, images), before)


def test_a_depth_head_in_half_precision_is_near(past_the_wall: ModuleType) -> None:
    model, images = make_model(), make_images(3)
    step = past_the_wall.steps(Runner.of(model), backend="eager")[0]["head"]
    before = depth(model, images)
    with step():
        after = depth(model, images)
    assert after.dtype == torch.float32
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.0)


@pytest.mark.slow
@pytest.mark.dynamo
@pytest.mark.parametrize("applied", [False, True])
def test_compiled_blocks_share_one_graph(past_the_wall: ModuleType, applied: bool) -> None:
    model, images = make_model(pairs=12), make_images(34)  # pieces of 12, 11 and 11 frames
    counter = CompileCounterWithBackend("eager")
    step = past_the_wall.steps(Runner.of(model), backend=counter)[0]["compiled"]
    layers = len(spark3r.families.detect(model).attention(model))
    with spark3r.apply(model, Schedule.uniform(layers, 4, 2)) if applied else nullcontext():
        before = depth(model, images)
        for _ in range(2):
            with step():
                torch.testing.assert_close(depth(model, images), before)
    assert counter.frame_count == 1 + applied  # one for each length of a piece


@pytest.mark.parametrize("name", STEPS)
def test_a_step_undoes_itself(past_the_wall: ModuleType, name: str) -> None:
    model, images = make_model(), make_images(4)
    step = past_the_wall.steps(Runner.of(model), backend="eager")[0][name]
    attributes = {path: dict(module.__dict__) for path, module in model.named_modules()}
    weights = {key: (value.clone(), value.stride()) for key, value in model.state_dict().items()}
    with spark3r.apply(model, Schedule.uniform(2, 4, 2)):
        before = depth(model, images)
        with step():
            assert depth(model, images).shape == before.shape
        assert torch.equal(depth(model, images), before)
    for path, module in model.named_modules():
        assert module.__dict__.keys() == attributes[path].keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key][0])
        assert value.stride() == weights[key][1]


def test_a_model_without_the_parts_says_so(past_the_wall: ModuleType) -> None:
    found, missing = past_the_wall.steps(Runner.of(stand_ins.Pi3().eval()), backend="eager")
    assert found.keys() == {"compiled"}
    assert missing.keys() == {"head", "merged"}


@pytest.mark.slow
def test_the_script_runs(
    past_the_wall: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "steps.json"
    sizes = ["--frames", "4", "--grid", "2x3", "--schedule", "uniform:3:2", "--rounds", "1"]
    past_the_wall.main([*sizes, "--backend", "eager", "--output", str(path)])
    rows = {row["step"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == {past_the_wall.BASE, *STEPS}
    assert rows[past_the_wall.BASE]["log_depth"] == 0
    assert rows["merged"]["log_depth"] > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
