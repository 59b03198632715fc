"""Plans by which a pass fits into memory."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import stand_ins
import torch
from command_line import run as command
from family_cases import CASES, Case, build, images, quiet, reducing
from known_vggt import LAYERS, KnownVggt
from profile_documents import reference_profile
from small_models import make_model
from torch import nn

from spark3r import (
    Clip,
    Prediction,
    Schedule,
    Spark3rError,
    apply,
    load_model,
    load_profile,
    reconstruct,
)
from spark3r.families.parts.limits import NONE, Limits, limited
from spark3r.families.registry import detect
from spark3r.fitting import MARGIN, FitError, Plan, bytes_of, fit, obviously_fits
from spark3r.memory import free_bytes, own_control_group
from spark3r.memory_count import MemoryCount, count_memory
from spark3r.runner import Runner

BF16 = torch.bfloat16


def peak(model: torch.nn.Module, frames: int, size: tuple[int, int], **settings: object) -> int:
    counted = count_memory(model, frames, size, reading=True, **settings)  # type: ignore[arg-type]
    return int(counted.total * MARGIN)


def same(left: Prediction, right: Prediction) -> bool:
    names = ("depth", "confidence", "extrinsics", "intrinsics", "points")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


def prediction(model: nn.Module, clip: torch.Tensor, dtype: torch.dtype, plan: Plan) -> Prediction:
    with quiet(), plan.applied(model):
        return Runner.of(model, dtype=dtype).predict(Clip("noise", clip))


def plan_of(case: Case, dtype: torch.dtype, limits: Limits = NONE) -> Plan:
    uncounted = MemoryCount(0, {}, "")
    return Plan(1, uncounted, 1, reducing(case.layers), None, None, True, limits, (), dtype)


PREDICTING = [case for case in CASES if detect(build(case)).predict is not None]


@pytest.mark.parametrize("case", PREDICTING, ids=str)
def test_limits_do_not_change_a_prediction(case: Case) -> None:
    model, clip = build(case), images(case, 20)[0]
    usual = plan_of(case, torch.float32)
    for limits in (Limits(frames=4), Limits(features_on_host=True, outputs_on_host=True)):
        limited = replace(usual, limits=limits)
        assert same(
            prediction(model, clip, torch.float32, limited),
            prediction(model, clip, torch.float32, usual),
        )


@pytest.mark.parametrize("case", PREDICTING, ids=str)
def test_weights_that_autocast_casts_may_be_stored_so(case: Case) -> None:
    if case.needs and case.family in ("omega", "pi3", "panovggt"):
        pytest.skip("upstream's heads do not run under the autocast of a CPU")
    model, clip = build(case), images(case, 5)[0]
    size = (clip.shape[2], clip.shape[3])
    plan = plan_of(case, BF16)
    lowered = count_memory(model, 5, size, dtype=BF16).lowered
    assert lowered
    expected = prediction(model, clip, BF16, plan)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[torch.dtype] = []
    module = model.get_submodule(lowered[0].rpartition(".")[0])
    hook = module.register_forward_pre_hook(lambda *_: seen.append(next(module.parameters()).dtype))
    found = prediction(model, clip, BF16, replace(plan, half_weights=lowered))
    hook.remove()
    assert set(seen) == {BF16}
    assert same(found, expected)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_heads_take_fewer_frames_at_a_time_where_they_are_told_to() -> None:
    model, clip = KnownVggt().eval(), torch.rand(20, 3, 56, 56)
    calls: list[int] = []
    model.depth_head.last.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    with apply(model, Schedule.dense(LAYERS)):
        with limited(Limits(head_frames=2)):
            few = Runner.of(model).predict(Clip("noise", clip))
        assert set(calls) == {2}
        calls.clear()
        usual = Runner.of(model).predict(Clip("noise", clip))
    assert set(calls) == {5}
    assert torch.allclose(few.depth, usual.depth, rtol=1e-4)


@pytest.mark.slow
def test_the_first_settings_that_fit_are_taken() -> None:
    model, size = make_model().to("meta"), (128, 128)
    plain = peak(model, 100, size, save_memory=False)
    saved = peak(model, 100, size)
    assert saved < plain
    taken = fit(model, frames=100, size=size, memory=plain)
    assert not taken.save_memory
    assert taken.peak == plain
    assert taken.longest >= 100
    taken = fit(model, frames=100, size=size, memory=saved)
    assert taken.save_memory
    assert taken.limits == NONE
    assert len(taken.lines()) == 5
    with pytest.raises(FitError) as refused:
        fit(model, frames=400, size=size, memory=saved)
    longest = int(str(refused.value).split("--frames ")[1].split(")")[0])
    assert fit(model, frames=longest, size=size, memory=saved).peak <= saved
    with pytest.raises(FitError):
        fit(model, frames=longest + max(2, longest // 50), size=size, memory=saved)
    needed = str(refused.value).split("--memory ")[1]
    assert fit(model, frames=400, size=size, memory=needed).peak <= bytes_of(needed)
    with pytest.raises(FitError, match="not even 2 frames"):
        fit(model, frames=100, size=size, memory=1000)


@pytest.mark.slow
def test_a_gpu_can_leave_features_on_the_host_and_weights_in_half_precision() -> None:
    model, size, frames = KnownVggt().to("meta"), (224, 224), 100
    count = partial(count_memory, model, frames, size, dtype=BF16, reading=True)
    saved = count()
    half = count(half_weights=saved.lowered)
    assert half.total < saved.total
    host = count(half_weights=saved.lowered, limits=Limits(4, 2, True, True))
    assert host.total < half.total
    assert host.host >= frames * 224 * 224 * 4
    plan = partial(fit, model, frames=frames, size=size, dtype=BF16)
    taken = plan(memory=int(half.total * MARGIN) + 1, device="cuda:0")
    assert taken.half_weights == saved.lowered
    assert not taken.count.host
    taken = plan(memory=int(host.total * MARGIN) + 1, device="cuda:0")
    assert taken.limits.features_on_host
    assert taken.limits.outputs_on_host
    with pytest.raises(FitError):  # a CPU has no other place
        plan(memory=int(host.total * MARGIN) + 1, device="cpu")


@pytest.mark.slow
def test_another_schedule_is_said_to_change_outputs() -> None:
    document = reference_profile()
    (chosen,) = document["schedules"]
    layers = [{**each, "query": 1, "key_value": 1} for each in chosen["layers"]]
    dense = {**chosen, "name": "whole", "layers": layers}
    document["schedules"] = [dense, chosen]
    document["default"] = "whole"
    Path("both.json").write_text(json.dumps(document))
    profile, size = load_profile("./both.json"), (128, 128)
    model = load_model("reference:random").to("meta")
    needs = {
        each: peak(
            model,
            100,
            size,
            schedule=profile.schedule(each),
            limits=Limits(frames=4, head_frames=2),
        )
        for each in ("whole", chosen["name"])
    }
    assert needs[chosen["name"]] < needs["whole"]
    room = needs["whole"] - 1
    taken = fit(model, frames=100, size=size, memory=room, profile=profile)
    assert taken.schedule_name == chosen["name"]
    assert "lossy: 'whole' does not fit" in "\n".join(taken.lines())
    with pytest.raises(FitError):
        fit(model, frames=100, size=size, memory=room, profile=profile, schedule="whole")


def test_a_reconstruction_by_a_plan_is_the_same() -> None:
    model, clip = stand_ins.Vggt().eval(), Clip("noise", torch.rand(20, 3, 56, 56))
    expected = reconstruct(model, clip).run.prediction
    plan = replace(fit(model, frames=20, size=(56, 56), memory="1GB"), save_memory=True)
    assert same(reconstruct(model, clip, plan=plan).run.prediction, expected)


@pytest.mark.slow
def test_the_command_prints_its_plan_or_refuses(tmp_path: Path) -> None:
    call = ("run", "--clip", "rendered:7", "--frames", "6", "--model", "reference:random")
    answer = command(*call, "--memory", "100MB", "--output", "out")
    assert answer.status == 0, answer.err
    plan = [line for line in answer.err.splitlines() if line.startswith("spark3r: plan: ")]
    assert len(plan) == 5
    assert "6 frames need" in plan[0]
    record = json.loads(Path("out/run.json").read_text())
    assert record["plan"] == [line.removeprefix("spark3r: plan: ") for line in plan]
    refused = command(*call, "--memory", "8MB", "--output", "other")
    assert refused.status == 1
    assert "6 frames need" in refused.err.splitlines()[-1]
    assert not Path("other").exists()
    assert command(*call, "--memory", "lots", "--output", "other").status == 2


def test_what_fits_by_far_is_not_counted() -> None:
    model = make_model()
    assert obviously_fits(model, 24, (64, 64), 2 * 10**9)
    assert not obviously_fits(model, 24, (64, 64), 10**9)


def test_sizes() -> None:
    assert bytes_of("12GB") == bytes_of(12 * 10**9) == 12 * 10**9
    assert bytes_of(" .5 gib") == 2**29
    for wrong in ("12", "GB", "-1GB", "0GB", "1 TB", 0):
        with pytest.raises(Spark3rError, match="expected a size"):
            bytes_of(wrong)


def test_what_a_machine_has_free_ends_at_the_limit_of_its_control_group(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    group = tmp_path / "cgroup" / "job"
    group.mkdir(parents=True)
    assert free_bytes(cgroup=group, meminfo=meminfo) == 5000 * 1024
    for name, text in (("max", "max"), ("current", "10"), ("stat", "anon 1\ninactive_file 500\n")):
        (group / f"memory.{name}").write_text(text)
    assert free_bytes(cgroup=group, meminfo=meminfo) == 5000 * 1024
    for name, text in (("max", "3000"), ("current", "1000"), ("stat", "inactive_file 500\n")):
        (group.parent / f"memory.{name}").write_text(text)
    assert free_bytes(cgroup=group, meminfo=meminfo) == 2500
    assert free_bytes(cgroup=group, meminfo=tmp_path / "none") is None
    own = tmp_path / "own"
    own.write_text("1:cpu:/other\n0::/job\n")
    assert own_control_group(own, group.parent) == group


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
