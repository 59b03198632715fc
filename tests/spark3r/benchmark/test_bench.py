"""The benchmark: treatments, lengths, attention calls, parts, and figures derived from them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import stand_ins
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_model import ToyModel

import spark3r
from spark3r.benchmark import backends
from spark3r.benchmark.api import bench
from spark3r.benchmark.breakdown import PARTS, SDPACall, profile_pass
from spark3r.benchmark.measure import bare_attention, measure_side_by_side
from spark3r.benchmark.result import COLUMNS, cells, growth_exponent, modelled_ms, rows_of
from spark3r.benchmark.treatments import treatments
from spark3r.cli.bench import BACKENDS
from spark3r.errors import FamilyError, ProfileError, ScheduleError
from spark3r.families import generic
from spark3r.kernels import forced
from spark3r.kernels.grouped_attention import OPERATION
from spark3r.layout import TokenLayout
from spark3r.reduction.operators import Operators, QueryMerging
from spark3r.reduction.plans import key_value_length, query_length
from spark3r.runner import Runner
from spark3r.schedule import Schedule, paper_schedule
from spark3r.sdpa import ReplaceSDPA
from spark3r.timing import Latency, Timer, Treatment

SCHEDULES = ("dense", "wall", "paper", "fastvggt", "uniform:4:2")


@given(
    st.floats(0.5, 3), st.floats(0.01, 100), st.lists(st.integers(1, 2000), min_size=2, unique=True)
)
def test_the_growth_exponent_of_a_power_is_its_exponent(
    power: float, scale: float, lengths
) -> None:
    points = [(n, scale * n**power) for n in lengths]
    assert growth_exponent(points) == pytest.approx(power, abs=1e-6)


@given(st.floats(0.1, 50), st.floats(1e-4, 0.1), st.integers(2, 4000))
def test_dense_is_modelled_as_linear_plus_quadratic(a: float, b: float, frames: int) -> None:
    points = [(n, a * n + b * n * n) for n in (600, 32, 128)]
    assert modelled_ms(points, frames) == pytest.approx(a * frames + b * frames**2)


def test_rows_of_every_treatment_and_length(model: nn.Module) -> None:
    result = bench(model, (6, 4), SCHEDULES, grid=(2, 4), sensitive=(1,), rounds=2)
    assert [(row.frames, row.schedule) for row in result.rows] == [
        (frames, name) for frames in (4, 6) for name in SCHEDULES
    ]
    for row in result.rows:
        assert row.tokens == row.frames * (5 + 8)
        assert row.n == 2
        assert row.ms > 0
        assert row.tokens_per_s == pytest.approx(1000 * row.tokens / row.ms)
        dense, wall = result.row(row.frames, "dense"), result.row(row.frames, "wall")
        assert row.speed_up == pytest.approx(dense.ms / row.ms)
        assert row.wall_share == pytest.approx(wall.ms / row.ms)
        assert set(row.parts_ms) == set(PARTS)
        assert len(cells(row)) == len(COLUMNS)
        assert (row.bare_ms is None) == (row.schedule in ("dense", "wall"))
    assert set(result.growth()) == set(SCHEDULES)
    assert not spark3r.is_applied(model)
    written = json.loads(json.dumps(result.to_dict()))
    assert {"frames", "schedule", "ms", "peak_mb"} <= set(written["rows"][0])
    assert written["environment"]["packages"]["torch"]


def test_dense_beyond_a_length_is_modelled_and_says_so(model: nn.Module) -> None:
    result = bench(
        model, (2, 3, 5), ("dense", "wall", "uniform:1:2"), grid=(2, 2), dense_up_to=3, rounds=1
    )
    dense = [row for row in result.rows if row.schedule == "dense"]
    assert [row.modelled for row in dense] == [False, False, True]
    assert dense[2].ms == modelled_ms([(row.frames, row.ms) for row in dense[:2]], 5)
    assert cells(dense[2])[1] == "dense (modelled)"
    reduced = result.row(5, "uniform:1:2")
    assert reduced is not None
    assert reduced.speed_up == pytest.approx(dense[2].ms / reduced.ms)
    assert result.growth()["dense"] == pytest.approx(
        growth_exponent([(row.frames, row.ms) for row in dense[:2]])
    )


def test_dense_may_run_once_and_time_may_be_the_processs(model: nn.Module) -> None:
    names = ("dense", "wall")
    result = bench(model, (2, 3), names, grid=(2, 2), rounds=2, once_from=3, cpu_time=True)
    assert [row.n for row in result.rows] == [2, 2, 1, 2]
    once = result.row(3, "dense")
    assert once is not None
    assert once.ms == pytest.approx(sum(once.parts_ms.values()))
    assert once.spread_ms == 0
    assert result.clock == "process"


def test_autocast_lowers_the_precision_of_attention(model: nn.Module) -> None:
    result = bench(model, (3,), ("uniform:2:2",), grid=(2, 2), rounds=1, dtype=torch.bfloat16)
    assert result.dtype == "float32, autocast bfloat16"
    seen = profile_pass(Runner.of(model, dtype=torch.bfloat16), torch.rand(2, 3, 16, 16))
    assert [call.dtype for call in seen.calls] == [torch.bfloat16] * 2


def test_attention_calls_of_a_pass_have_the_realised_lengths(model: nn.Module) -> None:
    schedule = paper_schedule("reference", 2, sensitive=[1])
    images = torch.rand(120, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    layout = TokenLayout(120, 2, 2, special=5, anchor_frame=0)
    runner = Runner.of(model)
    with spark3r.apply(model, schedule, guard=False):
        seen = profile_pass(runner, images)
    expected = [
        (query_length(layout, rule), key_value_length(layout, rule))
        for rule in schedule.resolve_within(layout)
    ]
    assert [(call.query[2], call.key[2]) for call in seen.calls] == expected
    assert not any(call.has_bias for call in seen.calls)
    assert all(seen.ms[part] > 0 for part in PARTS)
    dense = profile_pass(runner, images[:4])
    assert [(call.query[2], call.key[2]) for call in dense.calls] == [(36, 36)] * 2
    assert dense.ms["matching"] == dense.ms["merging"] == 0


def test_unmerging_counts_as_merging(model: nn.Module) -> None:
    images = torch.rand(8, 3, 32, 32)
    runner = Runner.of(model)
    merging = {}
    for unmerge in ("copy", "linear"):
        schedule = Schedule.uniform(2, query=4, operators=Operators(QueryMerging(unmerge=unmerge)))
        ticks = itertools.count()
        with spark3r.apply(model, schedule, guard=False):
            seen = profile_pass(runner, images, lambda ticks=ticks: float(next(ticks)))
        merging[unmerge] = seen.ms["merging"]
    # One second for each step of merging and unmerging in each of two layers.
    assert merging == {"copy": 4000, "linear": 4000}


def test_the_wall_computes_no_attention_and_fastvggt_fewer_tokens(model: nn.Module) -> None:
    images = torch.rand(8, 3, 32, 32)
    runner = Runner.of(model)
    found = treatments(("wall", "fastvggt"), runner)
    with found["wall"]():
        assert profile_pass(runner, images).calls == ()
    with found["fastvggt"]():
        seen = profile_pass(runner, images)
    layout = TokenLayout(8, 4, 4, special=5, anchor_frame=0)
    assert len(seen.calls) == 2
    for call in seen.calls:
        assert call.query == call.key == call.value
        assert layout.tokens / 4 < call.query[2] < layout.tokens / 1.5
    assert seen.ms["matching"] > 0
    assert seen.ms["merging"] > 0


def test_token_stride_is_mass_corrected(model: nn.Module) -> None:
    runner = Runner.of(model)
    found = treatments(("token_stride:1:2",), runner)
    with found["token_stride:1:2"]() as handle:
        seen = profile_pass(runner, torch.rand(6, 3, 16, 16))
    assert handle.schedule.operators.key_value.mass_correction == 1
    assert all(call.has_bias for call in seen.calls)


def test_attention_by_group_is_attention_without_a_mask(model: nn.Module) -> None:
    runner = Runner.of(model)
    found = treatments(("token_stride:1:2",), runner)
    with found["token_stride:1:2"]():
        masked = profile_pass(runner, torch.rand(6, 3, 16, 16))
        ticks = itertools.count()
        with forced(OPERATION, "flash"):
            seen = profile_pass(runner, torch.rand(6, 3, 16, 16), lambda: float(next(ticks)))
    assert seen.calls == tuple(replace(call, has_bias=False) for call in masked.calls)
    assert seen.ms["attention"] == 2000  # one second in each of two layers


def test_bare_attention_computes_the_same_calls(model: nn.Module) -> None:
    images = torch.rand(6, 3, 16, 16)
    runner = Runner.of(model)
    with treatments(("token_stride:2:3",), runner)["token_stride:2:3"]():
        seen = profile_pass(runner, images)
    called = []

    def note(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
        shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
        called.append(SDPACall(*shapes, query.dtype, attn_mask is not None))
        return query

    with ReplaceSDPA(note):
        bare_attention(seen.calls, torch.device("cpu"))()
    assert tuple(called) == seen.calls
    assert len(called) == 2


def test_treatments_that_run_out_of_memory_are_left_out(model: nn.Module) -> None:
    def fail_when_dense(*_: object) -> None:
        schedule = getattr(model.__dict__["_spark3r_handle"], "schedule", None)
        if schedule is not None and all(rule.is_dense for rule in schedule.layers):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    images = torch.rand(3, 3, 16, 16)
    runner = Runner.of(model)
    chosen = treatments(("dense", "wall"), runner)
    hook = model.aggregator.frame_blocks[1].register_forward_pre_hook(fail_when_dense)  # type: ignore[union-attr,index]
    measured = measure_side_by_side(runner, images, chosen, timer=Timer(rounds=1))
    assert list(measured) == ["wall"]
    assert not spark3r.is_applied(model)
    (row,) = rows_of(3, 27, measured)
    assert row.speed_up is None
    hook.remove()


def test_latencies_are_those_of_the_timer(model: nn.Module) -> None:
    class Fixed(Timer):
        def time_in_turns(self, asked: Sequence[Treatment], **_: object) -> dict[str, Latency]:
            assert [each.subject for each in asked] == [each.name for each in asked]
            return {each.name: Latency((float(len(each.name)),)) for each in asked}

    runner = Runner.of(model)
    chosen = treatments(("dense", "wall", "uniform:2:2"), runner)
    measured = measure_side_by_side(runner, torch.rand(3, 3, 16, 16), chosen, timer=Fixed())
    assert {name: each.latency.median_ms for name, each in measured.items()} == {
        "dense": 5,
        "wall": 4,
        "uniform:2:2": 11,
    }
    assert measured["uniform:2:2"].bare == Latency((16.0,))
    assert measured["dense"].bare is None


def test_another_failure_is_raised_and_leaves_the_model_alone(model: nn.Module) -> None:
    def fail(*_: object) -> object:
        raise ValueError("something else")

    model.aggregator.frame_blocks[1].register_forward_pre_hook(fail)  # type: ignore[union-attr,index]
    with pytest.raises(ValueError, match="something else"):
        bench(model, (3,), ("dense",), grid=(2, 2))
    assert not spark3r.is_applied(model)


def test_a_model_that_no_family_knows_is_measured_through_the_family_given() -> None:
    passes: list[int] = []

    def call(model: nn.Module, images: Tensor) -> Tensor:
        passes.append(len(images))
        return model(2 * images[None] - 1)  # normalised by the caller

    family = replace(generic("attn", patch_size=8), call=call)
    model = ToyModel().eval()
    model.register_forward_pre_hook(lambda _, args: passes.append(-len(args[0][0])))
    names = ("dense", "wall", "uniform:1:2", "fastvggt")
    result = bench(model, (2, 3), names, family=family, grid=(2, 2), rounds=1)
    assert [(row.frames, row.schedule) for row in result.rows] == [
        (frames, name) for frames in (2, 3) for name in names
    ]
    # Every pass goes through the family's call; those for the layout stop before the model's hook.
    assert passes.count(2) > passes.count(-2) >= 2 * len(names)
    row = result.row(3, "uniform:1:2")
    assert row is not None
    assert row.bare_ms is not None
    assert row.parts_ms["attention"] > 0
    assert row.parts_ms["heads"] > 0
    by_function = generic("attn", layout=lambda images: (1, TokenLayout(2, 2, 2)))
    with pytest.raises(FamilyError, match="does not say how large a patch is"):
        bench(model, (2,), ("dense",), family=by_function)


@pytest.mark.parametrize("make", [stand_ins.Vggt, stand_ins.Pi3, stand_ins.Da3, stand_ins.Omega])
def test_the_parts_of_every_family(make: Callable[[], nn.Module]) -> None:
    """Each tick of the clock is a part that began or ended; the encoder is no head."""
    runner = Runner.of(make().eval())
    patch = runner.family.metadata(runner.root)["patch_size"]
    ticks = itertools.count()
    seen = profile_pass(runner, torch.rand(2, 3, patch, 2 * patch), lambda: float(next(ticks)))
    assert len(seen.calls) == runner.depth
    assert seen.ms["encoder"] > 0
    assert seen.ms["attention"] == 1000 * runner.depth
    assert seen.ms["global projections"] == 2000 * runner.depth


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("papr", "no schedule is called 'papr', expected dense, wall, paper, fastvggt, uniform"),
        ("uniform:4", "expected uniform:QUERY:KEY_VALUE"),
        ("uniform:0:2", "query factor is 0"),
        ("uniform:2:-1", "expected uniform:QUERY:KEY_VALUE"),
        ("token_stride:2", "expected token_stride:QUERY:KEY_VALUE"),
    ],
)
def test_unknown_treatments(model: nn.Module, name: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        treatments((name,), Runner.of(model))


def test_profiles_are_treatments(model: nn.Module, tmp_path: Path) -> None:
    runner = Runner.of(model)
    with pytest.raises(ProfileError):
        treatments((str(tmp_path / "none.json"),), runner)
    with pytest.raises(spark3r.PatchError, match="does not fit"):
        treatments(("vggt-1b",), runner)
    with pytest.raises(ScheduleError, match="no schedule was named"):
        treatments((), runner)


def test_backends_of_the_command_are_those_there_are() -> None:
    assert BACKENDS == backends.BACKENDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fastest_backend_on_the_cpu(model: nn.Module, dtype: torch.dtype) -> None:
    runner = Runner.of(model, dtype=dtype)
    images = torch.rand(3, 3, 16, 16)
    name, ms = backends.fastest_backend(runner, images)
    assert name in ms
    assert "math" not in ms or len(ms) == 1
    for each in backends.first_sdpa_arguments(runner, images):
        assert each.shape == (1, 4, 3 * (4 + 5), 32)
        assert each.dtype == dtype
    with backends.sdpa_backend(name):
        query = torch.randn(1, 2, 8, 8)
        bias = torch.zeros(1, 1, 1, 8)
        nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=bias)


def test_a_layer_without_the_function_has_no_fastest_kernel(model: nn.Module) -> None:
    family = generic("aggregator.global_blocks.*.mlp", entry="aggregator", patch_size=8, special=5)
    with pytest.raises(FamilyError, match=r"Mlp does not call F\.scaled_dot"):
        backends.fastest_backend(Runner.of(model, family), torch.rand(2, 3, 16, 16))
