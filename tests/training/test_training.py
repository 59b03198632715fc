import random
from pathlib import Path

import pytest
import torch
from torch import nn

from spark3r.geometry import encode_pose
from spark3r.reference import load
from training.batches import Pool
from training.checkpoints import export_weights, load_checkpoint, save_checkpoint
from training.curriculum import SIZES, BatchShape, batch_shape, rate_factor
from training.losses import WEIGHTS, AuxiliaryHeads, training_losses, weighted_sum
from training.optimiser import FlatOptimiser, new_state, orthogonalise
from training.train import ActivationRecorder


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def modules() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"model": load(weights="random").train(), "heads": AuxiliaryHeads()})


@pytest.mark.parametrize("size", [(64, 64), (56, 72), (88, 48)])
def test_perfect_predictions_have_no_loss(pool: Path, size: tuple[int, int]) -> None:
    batch = Pool(pool).sample(BatchShape(2, 3, size), generator())
    both = modules()
    recorder = ActivationRecorder(both["model"])
    both["model"](batch.images)
    half = torch.tensor(size) / 2
    focal = half / torch.tan(batch.fov / 2)
    intrinsics = torch.zeros(2, 3, 3, 3)
    intrinsics[..., 1, 1], intrinsics[..., 0, 0] = focal[:, :1], focal[:, 1:]
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = half[1], half[0]
    intrinsics[..., 2, 2] = 1
    exact = {
        "pose_enc": encode_pose(batch.extrinsics, intrinsics, size),
        "depth": batch.depth[..., None],
        "depth_conf": torch.full_like(batch.depth, 2.0),
    }
    losses = training_losses(exact, recorder.take(), both["heads"], batch, 1)
    assert losses.keys() == WEIGHTS.keys()
    for name in ("depth", "gradient", "rotation", "translation", "relative", "fov"):
        assert losses[name] < 2e-3, name
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.slow
def test_steps_on_two_sizes_lower_the_loss(pool: Path) -> None:
    both = modules()
    count = sum(p.numel() for p in both.parameters())
    optimiser = FlatOptimiser(both, new_state(count, 1, torch.device("cpu")), 0, 1, True)
    recorder = ActivationRecorder(both["model"])
    batches = [
        Pool(pool).sample(BatchShape(2, 2, size), generator()) for size in ((56, 72), (88, 48))
    ]
    history: list[list[float]] = [[], []]
    for step in range(12):
        which = step % 2
        optimiser.zero_grad()
        predictions = both["model"](batches[which].images)
        losses = training_losses(predictions, recorder.take(), both["heads"], batches[which], 1)
        loss = weighted_sum(losses)
        loss.backward()
        optimiser.step(step, 0.01, 0.001)
        history[which].append(loss.item())
    for values in history:
        assert values[-1] < 0.8 * values[0]


def test_orthogonalise_brings_singular_values_near_one() -> None:
    for shape in ((3, 16, 16), (2, 8, 24), (2, 24, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator())))
        assert ((values > 0.4) & (values < 1.4)).all()


@pytest.mark.slow
def test_processes_together_take_the_step_of_one() -> None:
    gradients = torch.Generator().manual_seed(3)
    count = sum(p.numel() for p in modules().parameters())
    noise = torch.randn(count, generator=gradients)
    results = []
    for world in (1, 2):
        members = [modules() for _ in range(world)]
        state = new_state(count, world, torch.device("cpu"))
        optimisers = [
            FlatOptimiser(m, state, rank, world, rank == 0) for rank, m in enumerate(members)
        ]
        for member in members:
            start = 0
            for parameter in member.parameters():  # the same gradient whatever the flat order
                end = start + parameter.numel()
                assert parameter.grad is not None
                parameter.grad.copy_(noise[start:end].view(parameter.shape))
                start = end
        for optimiser in optimisers:
            optimiser.step(0, 0.01, 0.001)
        results.append({n: p.detach().clone() for n, p in members[-1].named_parameters()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-4, rtol=1e-3)


def test_gradients_that_are_not_finite_change_nothing() -> None:
    member = modules()
    state = new_state(sum(p.numel() for p in member.parameters()), 1, torch.device("cpu"))
    optimiser = FlatOptimiser(member, state, 0, 1, True)
    before = state.parameters.clone()
    state.gradients.fill_(float("nan"))
    optimiser.step(0, 0.1, 0.1)
    assert torch.equal(state.parameters, before)


@pytest.mark.slow
def test_checkpoints_are_small_and_restore(tmp_path: Path) -> None:
    member = modules()
    count = sum(p.numel() for p in member.parameters())
    optimiser = FlatOptimiser(member, new_state(count, 2, torch.device("cpu")), 0, 2, True)
    optimiser.state.momentum.normal_(generator=generator())
    optimiser.state.variance.uniform_(generator=generator())
    progress: dict[str, int | float] = {"step": 12, "clips": 3, "frames": 9, "seconds": 1.5}
    path = tmp_path / "latest.safetensors"
    save_checkpoint(path, member, optimiser, progress)
    assert path.stat().st_size < 64 * 2**20
    other = modules()
    restored = FlatOptimiser(other, new_state(count, 1, torch.device("cpu")), 0, 1, True)
    optimiser.state.parameters.zero_()
    assert load_checkpoint(path, other, restored) == progress
    expected = modules().state_dict()
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name])
    for name, (momentum, variance) in restored.moments().items():
        saved = optimiser.moments()[name]
        torch.testing.assert_close(momentum, saved[0], atol=1e-2, rtol=1e-2)
        if variance is not None:
            assert saved[1] is not None
            assert torch.equal(variance, saved[1])
    export_weights(tmp_path / "weights.safetensors", other["model"])
    assert (tmp_path / "weights.safetensors").stat().st_size < 16 * 2**20
    loaded = load(weights=tmp_path / "weights.safetensors").state_dict()
    for name, value in other["model"].state_dict().items():
        torch.testing.assert_close(loaded[name], value, atol=1e-3, rtol=1e-3)


def test_curriculum_is_seeded_and_grows() -> None:
    assert [batch_shape(s, 1) for s in range(50)] == [batch_shape(s, 1) for s in range(50)]
    early = [batch_shape(step, 0).frames for step in range(200)]
    late = [batch_shape(step, 0).frames for step in range(20_000, 20_200)]
    assert {batch_shape(step, 0).size for step in range(200)} == set(SIZES)
    assert max(early) == 4
    assert max(late) == 24
    state = random.getstate()
    batch_shape(5, 0)
    assert random.getstate() == state


def test_rate_warms_up_stays_and_falls_to_zero() -> None:
    assert rate_factor(0, 0, 100, 0.25) < 0.01
    assert rate_factor(5000, 70, 100, 0.25) == 1.0
    assert rate_factor(5000, 100, 100, 0.25) == 0.0
    assert rate_factor(5000, 87.5, 100, 0.25) == pytest.approx(0.5)
    assert rate_factor(5000, 100, 100, 0.0) == 1.0
