"""Pi3X with given poses: its own cross-frame attention is left alone."""

from __future__ import annotations

import pytest
import stand_ins
import torch
import upstream_models as upstream
from family_cases import Case, attentions, build, difference, images, missing, reducing, run
from torch import Tensor, nn

import spark3r
from spark3r import Schedule
from spark3r.reduction.rule import ResolvedRule

STAND_IN = Case("pi3x-stand-in", "pi3", stand_ins.Pi3X, 3)
UPSTREAM = Case(
    "pi3x-poses-upstream", "pi3", upstream.pi3x_with_poses, 2, ("pi3", "huggingface_hub")
)
CASES = [
    pytest.param(STAND_IN, id=str(STAND_IN)),
    pytest.param(
        UPSTREAM,
        id=str(UPSTREAM),
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(bool(missing(UPSTREAM)), reason="NOT VERIFIED: Pi3X is missing"),
        ],
    ),
]


def _poses(frames: int) -> Tensor:
    poses = torch.eye(4).repeat(1, frames, 1, 1)
    poses[0, :, 0, 3] = 0.3 * torch.arange(frames)
    poses[0, :, :2, :2] = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    return poses


@pytest.mark.parametrize("case", CASES)
def test_given_poses_are_injected_as_before(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clip = build(case), images(case, 5)
    given = {"poses": _poses(5)}
    without, dense = run(model, clip), run(model, clip, **given)
    assert difference(dense, without) > 1e-6, "the poses change nothing"
    monkeypatch.setattr(ResolvedRule, "is_dense", property(lambda rule: False))
    with spark3r.apply(model, Schedule.dense(case.layers)):
        assert difference(run(model, clip, **given), dense) == 0.0
    monkeypatch.undo()

    own: dict[nn.Module, list[tuple[Tensor, ...]]] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        own.setdefault(module, []).append((args[0], output))

    theirs = [*model.get_submodule("pose_inject_blk"), model.get_submodule("metric_decoder")]
    hooks = [module.register_forward_hook(record) for module in theirs]
    with spark3r.apply(model, reducing(case.layers)):
        assert len(attentions(model)) == case.layers
        patched = {m for m in model.modules() if "_spark3r_place" in vars(m)}
        assert patched == set(attentions(model).values())
        assert not patched & {inner for module in theirs for inner in module.modules()}
        reduced = run(model, clip, **given)
    for hook in hooks:
        hook.remove()
    assert difference(reduced, dense) > 1e-6
    assert all(bool(value.isfinite().all()) for value in reduced.values())
    called = [module for module in theirs if module in own]
    assert theirs[0] in called, "the first pose injection ran"
    assert theirs[-1] in called, "the metric decoder ran"
