"""Patched models that are copied, saved, sent to another process, traced or exported."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, Case, build, difference, images, reducing, run
from patched import REDUCED, depth, snapshot
from small_models import make_images, make_model
from torch import nn
from toy_model import ToyModel
from upstream_models import flat

import spark3r
from spark3r import LayoutError, PatchError, Schedule
from spark3r.families import FAMILIES, generic


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def pickled(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.mark.parametrize("duplicate", [saved_and_loaded, pickled, copy.deepcopy])
def test_a_copy_computes_the_same_bits_and_is_restored_alone(
    case: Case, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    if case.name == "mapanything-upstream" and duplicate is not copy.deepcopy:
        pytest.skip("the attention of upstream's encoder is of a class that pickle cannot find")
    model, clip = build(case), images(case, 5)
    dense, before = run(model, clip), snapshot(model)
    with spark3r.apply(model, reducing(case.layers)) as handle:
        reduced = run(model, clip)
        with handle.disabled():
            twin = duplicate(model)
        assert difference(run(twin, clip), reduced) == 0.0
        spark3r.remove(twin)
        assert difference(run(twin, clip), dense) == 0.0
        assert snapshot(twin) == before
        assert difference(run(model, clip), reduced) == 0.0
    assert difference(run(model, clip), dense) == 0.0


def test_a_copys_handle_knows_its_family(model: nn.Module) -> None:
    spark3r.apply(model, REDUCED)
    handle = pickled(model).__dict__["_spark3r_handle"]
    assert handle.family is FAMILIES["reference"]
    assert handle.schedule == REDUCED
    handle.remove()
    assert not spark3r.is_applied(handle.root)


def test_a_model_of_no_family_is_pickled_too() -> None:
    model, clip = ToyModel().eval(), make_images(8, 16, 16)[None]
    spark3r.apply(model, Schedule.uniform(1, 3, 2), family=generic("attn", patch_size=8))
    with torch.no_grad():
        assert torch.equal(pickled(model)(clip), model(clip))


def _work(model: nn.Module, clip: torch.Tensor, path: Path, threads: int) -> None:
    torch.set_num_threads(threads)  # another number sums in another order
    torch.save(depth(model, clip), path)


@pytest.mark.slow
def test_a_patched_model_is_sent_to_a_spawned_process(model: nn.Module, tmp_path: Path) -> None:
    spark3r.apply(model, REDUCED)
    clip = make_images(6)
    expected = depth(model, clip)
    process = multiprocessing.get_context("spawn").Process(
        target=_work, args=(model, clip, tmp_path / "depth", torch.get_num_threads())
    )
    process.start()
    process.join()
    assert torch.equal(torch.load(tmp_path / "depth"), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_is_refused_by_name_and_pausing_lets_it_pass(model: nn.Module) -> None:
    clip = make_images(4)
    dense = depth(model, clip)
    with spark3r.apply(model, REDUCED) as handle:
        with pytest.raises(LayoutError, match=r"torch\.jit\.trace.*dynamo=False.*torch\.export"):
            torch.jit.trace(model, (clip,), strict=False)
        with handle.disabled():
            traced: Any = torch.jit.trace(model, (clip,), strict=False, check_trace=False)
        assert torch.equal(traced(clip)["depth"], dense)


class _Flat(nn.Module):
    """A model that returns tensors alone: torch.export knows none of DA3's own kind of outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, clip: torch.Tensor) -> dict[str, torch.Tensor]:
        return flat(self.model(clip))


@pytest.mark.slow
@pytest.mark.dynamo
def test_a_patched_model_is_exported(case: Case) -> None:
    if case.name == "panovggt-upstream":
        pytest.skip("upstream's decoders try one call and make another, which export cannot follow")
    model, clip = build(case), images(case, 5)
    with spark3r.apply(model, reducing(case.layers)):
        reduced = run(model, clip)
        exported = torch.export.export(_Flat(model), (clip,), strict=False)
    assert difference(run(exported.module(), clip), reduced) < 1e-5


def test_replicas_are_refused_by_name() -> None:
    model = make_model()
    spark3r.apply(model, REDUCED)
    with pytest.raises(PatchError, match=r"to another device, .*\(DistributedDataParallel\)$"):
        _replica(model)(make_images(3))
    assert depth(model, make_images(3)).isfinite().all()


def _replica(module: nn.Module) -> Any:
    """Return what DataParallel makes of a module for its second device."""
    replica: Any = module._replicate_for_data_parallel()
    replica._former_parameters = {}
    for name, child in module.named_children():
        replica._modules[name] = _replica(child)
    for name, value in module._parameters.items():
        setattr(replica, name, value)
    return replica
