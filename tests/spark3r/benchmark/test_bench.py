"""The benchmark measures what it says: treatments, lengths, products, what follows from them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import spark3r
from spark3r.benchmark import backends, measure
from spark3r.benchmark.api import bench
from spark3r.benchmark.breakdown import PARTS, record
from spark3r.benchmark.result import COLUMNS, cells, growth_exponent, modelled_ms
from spark3r.benchmark.treatments import treatments
from spark3r.cli.bench import BACKENDS
from spark3r.errors import ProfileError, ScheduleError
from spark3r.layout import TokenLayout
from spark3r.reduction.merging import query_length
from spark3r.reduction.pruning import key_value_length
from spark3r.reduction.resolve import resolve
from spark3r.schedule import Operators, Schedule, paper_schedule

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


def test_autocast_lowers_the_precision_of_products(model: nn.Module) -> None:
    result = bench(model, (3,), ("uniform:2:2",), grid=(2, 2), rounds=1, autocast=torch.bfloat16)
    assert result.dtype == "float32, autocast bfloat16"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert record(model, torch.rand(2, 3, 16, 16)).dtypes == (torch.bfloat16,) * 2


def test_the_products_of_a_pass_have_the_realised_lengths(model: nn.Module) -> None:
    schedule = paper_schedule("reference", 2, sensitive=[1])
    images = torch.rand(120, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    layout = TokenLayout(120, 2, 2, special=5, anchor_frame=0)
    with spark3r.apply(model, schedule):
        seen = record(model, images)
    expected = [
        (query_length(layout, rule), key_value_length(layout, rule))
        for rule in resolve(schedule, layout)
    ]
    assert [(query[2], key[2]) for query, key, _ in seen.products] == expected
    assert seen.biased == (False, False)
    assert all(seen.ms[part] > 0 for part in PARTS)
    dense = record(model, images[:4])
    assert [(q[2], k[2]) for q, k, _ in dense.products] == [(36, 36)] * 2
    assert dense.ms["matching"] == dense.ms["merging"] == 0


def test_what_linear_unmerging_does_counts_as_merging(model: nn.Module) -> None:
    images = torch.rand(8, 3, 32, 32)
    merging = {}
    for unmerge in ("copy", "linear"):
        schedule = Schedule.uniform(2, query=4, operators=Operators(unmerge=unmerge))
        ticks = itertools.count()
        with spark3r.apply(model, schedule):
            seen = record(model, images, clock=lambda ticks=ticks: float(next(ticks)))
        merging[unmerge] = seen.ms["merging"]
    assert merging["linear"] > merging["copy"] > 0


def test_wall_has_no_products_and_the_peer_fewer_tokens(model: nn.Module) -> None:
    images = torch.rand(8, 3, 32, 32)
    wall, peer = treatments(("wall", "fastvggt"), model)
    with wall.put_on(model):
        assert record(model, images).products == ()
    with peer.put_on(model):
        seen = record(model, images)
    layout = TokenLayout(8, 4, 4, special=5, anchor_frame=0)
    for query, key, value in seen.products:
        assert query == key == value
        assert layout.tokens / 4 < query[2] < layout.tokens / 1.5
    assert seen.ms["matching"] > 0


def test_token_stride_is_mass_corrected(model: nn.Module) -> None:
    (treatment,) = treatments(("token_stride:1:2",), model)
    with treatment.put_on(model) as handle:
        seen = record(model, torch.rand(6, 3, 16, 16))
    assert handle.schedule.operators.mass_correction == 1
    assert seen.biased == (True, True)


def test_bare_attention_computes_the_same_products(model: nn.Module) -> None:
    images = torch.rand(6, 3, 16, 16)
    (treatment,) = treatments(("uniform:2:3",), model)
    with treatment.put_on(model):
        seen = record(model, images)
    called = []

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is nn.functional.scaled_dot_product_attention:
                called.append(tuple(tuple(t.shape) for t in args))
            return func(*args, **(kwargs or {}))

    with Watching():
        measure.bare_attention(seen, torch.device("cpu"))()
    assert tuple(called) == seen.products


def test_what_does_not_fit_is_left_out(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure.record

    def failing(model: nn.Module, *rest: object) -> object:
        applied = model.__dict__["_spark3r_handle"].schedule
        if all(rule.is_dense for rule in applied.layers):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return whole(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "record", failing)
    result = bench(model, (3,), ("dense", "wall"), grid=(2, 2), rounds=1)
    assert [row.schedule for row in result.rows] == ["wall"]
    assert result.rows[0].speed_up is None
    assert not spark3r.is_applied(model)


def test_another_failure_is_raised_and_leaves_the_model_alone(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> object:
        raise ValueError("something else")

    monkeypatch.setattr(measure, "run", fail)
    with pytest.raises(ValueError, match="something else"):
        bench(model, (3,), ("dense",), grid=(2, 2))
    assert not spark3r.is_applied(model)


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
def test_names_that_are_none(model: nn.Module, name: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        treatments((name,), model)


def test_profiles_are_treatments(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ProfileError):
        treatments((str(tmp_path / "none.json"),), model)
    with pytest.raises(spark3r.PatchError, match="does not fit"):
        treatments(("vggt-1b",), model)
    with pytest.raises(ScheduleError, match="no schedule was named"):
        treatments((), model)


def test_backends_of_the_command_are_those_there_are() -> None:
    assert BACKENDS == backends.BACKENDS


def test_the_fastest_backend_on_the_cpu() -> None:
    name, ms = backends.fastest_backend(2, 64, 8, torch.device("cpu"), torch.float32)
    assert name in ms
    assert "math" not in ms or len(ms) == 1
    with backends.sdpa_backend(name):
        query = torch.randn(1, 2, 8, 8)
        bias = torch.zeros(1, 1, 1, 8)
        nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=bias)
