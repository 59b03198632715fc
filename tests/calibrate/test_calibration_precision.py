"""Calibration under autocast: passes in half precision, and all that follows from them in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_job
import torch
import torch.nn.functional as F
from tiny_job import FixedTimer, main
from torch import nn
from torch.overrides import TorchFunctionMode

import calibrate
import calibrate.measure.evaluator
from calibrate.budget import parse_budget
from calibrate.clips import split_clips
from calibrate.measure.timing import fit_latency, time_layers
from calibrate.pipeline import run
from calibrate.search.run import search_options
from calibrate.settings import Settings, make_job
from spark3r import Operators, Profile, Spark3rError, Spark3rWarning, apply
from spark3r.prediction import Prediction
from spark3r.reduction.operators import QueryMerging, TokenStride
from spark3r.reduction.rule import ResolvedRule
from spark3r.runner import Runner, matmul_dtype

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
JOB = ["--budget", "75%", "--frames", "4", "--size", "16", "--target-frames", "64", "--trials", "1"]
JOB += [part for seed in range(4) for part in ("--clip", f"rendered:{1_000_000 + seed}")]
JOB += ["--quiet", "--model"]


class Products(TorchFunctionMode):
    """Notes the precision of every attention product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.dtypes.append(output.dtype)
        return output


@pytest.fixture
def assessed(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Precisions that predictions come in and metrics are computed in."""
    seen: list[torch.dtype] = []
    assess = calibrate.measure.evaluator.assess

    def noted(prediction: Prediction, *args: Any, **kwargs: Any) -> Any:
        seen.extend((prediction.depth.dtype, prediction.points.dtype, matmul_dtype(F32, "cpu")))
        return assess(prediction, *args, **kwargs)

    monkeypatch.setattr(calibrate.measure.evaluator, "assess", noted)
    return seen


@pytest.fixture
def _job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny_job.place(monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("_job")
def test_whole_job_under_autocast(assessed: list[torch.dtype], tmp_path: Path) -> None:
    model, clips = tiny_job.make_tiny(), tiny_job.clips()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with Products() as products:
        profile = calibrate.calibrate(
            model, clips, budget="75%", target_frames=64, trials=1, dtype=BF16, timer=FixedTimer()
        )
    assert len(products.dtypes) > 100
    assert set(products.dtypes) == {BF16}
    assert set(assessed) == {F32}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert profile.measurements[0].dtype == "bfloat16"

    profile.save(tmp_path / "tiny.json")
    images = clips[0].images
    with apply(model, tmp_path / "tiny.json"), torch.autocast("cpu", BF16):
        model(images)  # warnings are errors here
    with apply(model, tmp_path / "tiny.json"), pytest.warns(Spark3rWarning, match="in bfloat16"):
        model(images)


@pytest.mark.slow
@pytest.mark.usefixtures("_job")
def test_parameters_that_the_user_cast_stay_so(assessed: list[torch.dtype]) -> None:
    model = tiny_job.make_tiny().bfloat16()
    with Products() as products:
        profile = calibrate.calibrate(
            model, tiny_job.clips(), budget="75%", target_frames=64, trials=1, timer=FixedTimer()
        )
    assert set(products.dtypes) == {BF16}
    assert set(assessed) == {F32}
    assert {parameter.dtype for parameter in model.parameters()} == {BF16}
    assert profile.measurements[0].dtype == "bfloat16"


@pytest.mark.slow
@pytest.mark.usefixtures("_job")
def test_a_model_in_double_precision_and_training_mode_is_calibrated_as_it_predicts() -> None:
    model, same = tiny_job.make_tiny().double().train(), tiny_job.make_tiny().double()
    block = model.aggregator.frame_blocks[0]
    block.ls1 = nn.Sequential(block.ls1, nn.Dropout(0.5)).train()
    with Products() as products:
        profile, expected = (
            calibrate.calibrate(
                each, tiny_job.clips(), budget="75%", target_frames=64, trials=1, timer=FixedTimer()
            )
            for each in (model, same)
        )
    assert set(products.dtypes) == {torch.float64}
    assert all(module.training for module in model.modules())
    assert profile.measurements[0].dtype == "float64"
    assert profile.schedule() == expected.schedule()
    assert profile.measurements == expected.measurements


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_latency_is_of_products_in_that_precision(model: nn.Module, dtype: torch.dtype) -> None:
    images = torch.rand(6, 3, 16, 16)
    operators = [Operators(), Operators(key_value=TokenStride(mass_correction=1.0))]
    with Products() as products:
        table = fit_latency(
            Runner.of(model, dtype=dtype),
            images,
            operators,
            query_factors=(1, 2),
            key_value_factors=(1, 2, 4),
            limit_s=0.05,
        )
    assert set(products.dtypes) == {dtype}
    assert {"dense", "wall"} <= table.passes.keys()


def test_layers_are_timed_as_the_model_calls_them(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lowered(images: torch.Tensor) -> Any:
        with torch.autocast("cpu", BF16):
            return type(model).forward(model, images)

    monkeypatch.setattr(model, "forward", lowered)
    rules = [ResolvedRule(), ResolvedRule(2, 2, Operators(QueryMerging(group=2)))]
    with Products() as products:
        runner = Runner.of(model, dtype=F32)
        time_layers(runner, torch.rand(4, 3, 16, 16), rules, limit_s=0.01)
    assert set(products.dtypes) == {BF16}


def test_precisions_have_studies_of_their_own() -> None:
    model, split = tiny_job.make_tiny(), split_clips(tiny_job.clips())

    def name(dtype: torch.dtype) -> str:
        settings = Settings(parse_budget("75%"), dtype=dtype)
        return search_options(make_job(model, split, settings), split, 64).name

    assert len({name(dtype) for dtype in (F32, BF16, F16)}) == 3


def test_wrong_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.float64, expected torch.float32"):
        Settings(parse_budget("75%"), dtype=torch.float64)
    split = split_clips(tiny_job.clips())
    with (
        torch.autocast("cpu", BF16),
        pytest.raises(Spark3rError, match="give the precision as dtype="),
    ):
        run(tiny_job.make_tiny(), split, Settings(parse_budget("75%")))


@pytest.mark.slow
@pytest.mark.usefixtures("_job")
def test_another_budget_from_a_profile_needs_its_precision(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = [*JOB, "tiny_job:make_tiny", "--output"]
    assert main([*job, "a.json", "--dtype", "bfloat16"]) == 0
    again = [*job, "b.json", "--from", "a.json", "--budget", "60%"]
    capsys.readouterr()
    assert main(again) == 1
    error = capsys.readouterr().err
    assert "the profile was measured in bfloat16, the model runs in float32" in error
    assert main([*again, "--dtype", "float16"]) == 1
    assert "the model runs in float16" in capsys.readouterr().err
    assert main([*again, "--dtype", "bfloat16"]) == 0
    assert Profile.load("b.json").measurements[0].dtype == "bfloat16"


@pytest.mark.usefixtures("_job")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tiny_job:make_single", "calibrate: the model does not run in bfloat16 on cpu (lu_cpu"),
        ("tiny_job:make_nan", "calibrate: layer 1 (aggregator.global_blocks.1.attn), "),
    ],
)
def test_a_model_that_does_not_run_in_this_precision(
    model: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*JOB, model, "--dtype", "bfloat16"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert not list(Path().glob("*.json"))
