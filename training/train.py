"""Train the reference model: `python -m training.train --minutes 60`.

A session resumes from `latest.safetensors` in the run folder if there is one, trains at a constant
rate and, with `--decay`, ends in a linear decay to zero. During the decay it writes
`decayed.safetensors` instead, so that the next session resumes from before the decay unless
`--resume` names another checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Barrier
from types import MethodType
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spark3r.reference.blocks import Block
from spark3r.reference.model import ReferenceModel
from spark3r.reference.weights import load
from spark3r.rope import Rope

from .batches import Pool
from .checkpoints import export_weights, load_checkpoint, save_checkpoint
from .curriculum import ADAM_RATE, MUON_RATE, BatchShape, batch_shape, rate_factor
from .footage import mean_scores, read_rooms, score_footage
from .losses import (
    ATTENTION_BLOCKS,
    FLOW_BLOCK,
    MATCH_BLOCK,
    Activations,
    AuxiliaryHeads,
    training_losses,
    weighted_sum,
)
from .optimiser import FlatOptimiser, FlatState, new_state

LOG_STEPS = 50
POOL_STEPS = 100  # steps between two searches for newly rendered shards


@dataclass(frozen=True)
class Options:
    """The options of the command line, as `parser` explains them."""

    run: Path
    pool: Path
    minutes: float
    decay: float
    processes: int
    device: str
    compile: bool
    seed: int
    checkpoint_minutes: float
    validation: Path | None
    validation_minutes: float
    resume: Path | None


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, whose arguments are the fields of `Options`."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = result.add_argument
    add("--run", type=Path, default=Path("runs/reference"), help="folder of checkpoints and log")
    add("--pool", type=Path, default=Path("runs/pool"), help="folder of rendered training clips")
    add("--minutes", type=float, default=60.0, help="length of this session (default: 60)")
    add(
        "--decay",
        type=float,
        default=0.0,
        help="share of the session, at its end, in which the rate decays to 0 (default: 0); "
        "above 1 the session starts below the full rate",
    )
    add("--processes", type=int, default=2, help="single-threaded processes on a CPU (default: 2)")
    add("--device", default="cpu", help="default: cpu")
    add("--compile", action="store_true", help="compile the blocks; saves a quarter of the time")
    add("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    add("--checkpoint-minutes", type=float, default=4.0, help="between checkpoints (default: 4)")
    add("--validation", type=Path, help="folder of path-traced clips that choose the best weights")
    add("--validation-minutes", type=float, default=30.0, help="between validations (default: 30)")
    add("--resume", type=Path, help="checkpoint to resume from (default: the run folder's latest)")
    return result


def main() -> None:
    """Parse the command line and train."""
    options = Options(**vars(parser().parse_args()))
    options.run.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    world = options.processes if device.type == "cpu" else 1
    count = sum(parameter.numel() for parameter in _modules(options.seed).parameters())
    clock = torch.zeros(1, dtype=torch.float64).share_memory_()
    context = torch.multiprocessing.get_context("spawn")
    shared = Shared(new_state(count, world, device), clock, context.Barrier(world), world)
    if world == 1:
        _train(0, options, shared)
    else:
        spawn(_train, (options, shared), nprocs=world)


@dataclass(frozen=True)
class Shared:
    """State that the processes of a session share."""

    state: FlatState
    clock: Tensor  # [1] float64, seconds since the session began, by process 0's clock
    barrier: Barrier
    world: int


def _modules(seed: int) -> nn.ModuleDict:
    """Return the model and the auxiliary heads with their initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = AuxiliaryHeads()
    return nn.ModuleDict({"model": load(weights="random", seed=seed).train(), "heads": heads})


class ActivationRecorder:
    """Records the activations that the auxiliary tasks read, by forward hooks.

    Args:
        model: The model, which keeps the hooks.
    """

    def __init__(self, model: ReferenceModel) -> None:
        self._start = model.aggregator.patch_start_idx
        self._outputs: dict[str, Tensor] = {}
        self._inputs: dict[int, tuple[Block, Tensor, Rope]] = {}
        blocks = model.aggregator.global_blocks
        for name, index in (("match", MATCH_BLOCK), ("flow", FLOW_BLOCK)):
            blocks[index].register_forward_hook(self._keep_output(name))
        model.aggregator.register_forward_hook(self._keep_output("final"))
        for index in ATTENTION_BLOCKS:
            blocks[index].register_forward_pre_hook(self._keep_input(index))

    def _keep_output(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def _keep_input(self, index: int) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            assert isinstance(module, Block)
            self._inputs[index] = (module, *inputs)

        return hook

    def take(self) -> Activations:
        """Return the activations of the last forward pass and forget them."""
        final = self._outputs.pop("final")
        match, flow = (self._outputs.pop(name).view_as(final) for name in ("match", "flow"))
        attended = tuple(self._inputs.pop(index) for index in ATTENTION_BLOCKS)
        start = self._start
        return Activations(match[:, :, start:], flow[:, :, start:], final[:, :, start:], attended)


@contextlib.contextmanager
def _precision(device: torch.device) -> Iterator[None]:
    """Use bf16 matrix products; on a CPU also explicit softmax, whose backward pass is faster."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if device.type == "cpu":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _compile_blocks(model: ReferenceModel) -> None:
    """Compile the blocks, once for each of the few shapes that training uses."""
    # The pattern matcher would turn explicit attention back into the fused one.
    torch._inductor.config.pattern_matcher = False
    torch._dynamo.config.recompile_limit = 64
    # All blocks share one function, so that a shape is compiled once and not once per block.
    compiled = torch.compile(Block.forward, dynamic=False)
    for block in (*model.aggregator.frame_blocks, *model.aggregator.global_blocks):
        block.forward = MethodType(compiled, block)


def _train(rank: int, options: Options, shared: Shared) -> None:
    """Run one process of a session."""
    device = torch.device(options.device)
    if device.type == "cpu" and shared.world > 1:
        torch.set_num_threads(1)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    modules = _modules(options.seed).to(device)
    optimiser = FlatOptimiser(modules, shared.state, rank, shared.world, initialise=rank == 0)
    stable, decayed = (options.run / f"{name}.safetensors" for name in ("latest", "decayed"))
    source = options.resume or (stable if stable.exists() else None)
    progress: dict[str, int | float] = {"step": 0, "clips": 0, "frames": 0, "seconds": 0.0}
    if source:  # every process reads it; writing the shared tensors twice is harmless
        progress = load_checkpoint(source, modules, optimiser)
    compute = _Gradients(modules, optimiser, options, rank)
    shared.barrier.wait()
    begin, earlier = time.monotonic(), float(progress["seconds"])
    length, saved, log = 60.0 * options.minutes, 0.0, LossLog(options.run / "log.jsonl")
    validation = None
    if options.validation and rank == 0:
        validation = Validation(options.validation, options.run, options.validation_minutes)
    with Progress(disable=rank > 0) as bar:
        task = bar.add_task("training", total=length)
        while True:
            if rank == 0:  # one clock for all, or the processes would stop at different steps
                shared.clock[0] = time.monotonic() - begin
            shared.barrier.wait()
            elapsed = float(shared.clock[0])
            decaying = options.decay > 0 and elapsed > (1 - options.decay) * length
            if rank == 0 and elapsed - saved > 60.0 * options.checkpoint_minutes:
                save_checkpoint(decayed if decaying else stable, modules, optimiser, progress)
                export_weights(options.run / "weights.safetensors", modules["model"])
                saved = elapsed
                if validation:
                    validation.run(progress, elapsed)
            if elapsed >= length:
                break
            step = int(progress["step"])
            losses, shape = compute(step)
            shared.barrier.wait()
            factor = rate_factor(step, elapsed, length, options.decay)
            norm = optimiser.step(step, factor * MUON_RATE, factor * ADAM_RATE)
            progress["step"] = step + 1
            progress["clips"] += shape.clips * shared.world
            progress["frames"] += shape.clips * shape.frames * shared.world
            progress["seconds"] = earlier + elapsed
            if rank == 0:
                log.add(progress, shape.frames, losses, norm, factor)
                bar.update(task, completed=elapsed)
    if rank == 0:
        save_checkpoint(decayed if options.decay > 0 else stable, modules, optimiser, progress)
        export_weights(options.run / "weights.safetensors", modules["model"])
        if validation:
            validation.run(progress, math.inf)


class _Gradients:
    """Draws this process's batch of a step and computes its gradients."""

    def __init__(
        self, modules: nn.ModuleDict, optimiser: FlatOptimiser, options: Options, rank: int
    ) -> None:
        model, heads = modules["model"], modules["heads"]
        assert isinstance(model, ReferenceModel)
        assert isinstance(heads, AuxiliaryHeads)
        self._model, self._heads, self._optimiser = model, heads, optimiser
        self._recorder, self._pool = ActivationRecorder(model), Pool(options.pool)
        self._seed, self._rank = options.seed, rank
        self._device = torch.device(options.device)
        if options.compile:
            _compile_blocks(model)

    def __call__(self, step: int) -> tuple[dict[str, Tensor], BatchShape]:
        """Run forward and backward and return the losses and the size of the batch."""
        if step % POOL_STEPS == 0:
            self._pool.refresh()
        shape = batch_shape(step, self._seed)
        generator = torch.Generator().manual_seed((self._seed << 32) + step * 64 + self._rank)
        batch = self._pool.sample(shape, generator).to(self._device)
        self._optimiser.zero_grad()
        with _precision(self._device):
            predictions = self._model(batch.images)
        shift = 1 + step % max(1, shape.frames - 1)
        losses = training_losses(predictions, self._recorder.take(), self._heads, batch, shift)
        weighted_sum(losses).backward()
        return losses, shape


class Validation:
    """Scores exported weights on path-traced clips and keeps the best weights.

    Args:
        folder: Folder of the clips; none of them may be from a training or judging seed.
        run: Folder of the run. `validation.jsonl` gets a line per validation, and
            `best.safetensors` the weights with the highest AUC@30 so far.
        minutes: Least time between two validations.
    """

    def __init__(self, folder: Path, run: Path, minutes: float) -> None:
        self._clips, self._run, self._seconds = read_rooms(folder), run, 60.0 * minutes
        self._log, self._last = run / "validation.jsonl", 0.0
        self._best = 0.0
        if self._log.exists():
            lines = self._log.read_text().splitlines()
            self._best = max((json.loads(line)["auc_30"] for line in lines), default=0.0)

    def run(self, progress: dict[str, int | float], elapsed: float) -> None:
        """Validate the run's exported weights, unless it is too early.

        Args:
            progress: Progress that the line in the log repeats.
            elapsed: Seconds since the session began.
        """
        if elapsed - self._last < self._seconds:
            return
        self._last = elapsed
        weights = self._run / "weights.safetensors"
        model = load(weights=weights)
        scores = mean_scores([score_footage(model, clip) for clip in self._clips])
        with self._log.open("a") as file:
            file.write(json.dumps(progress | asdict(scores)) + "\n")
        if scores.auc_30 > self._best:
            self._best = scores.auc_30
            shutil.copyfile(weights, self._run / "best.safetensors")


class LossLog:
    """Writes mean losses per clip length as JSON lines.

    Args:
        path: The file, to which lines are appended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sums: dict[str, list[float]] = {}

    def add(
        self,
        progress: dict[str, int | float],
        frames: int,
        losses: dict[str, Tensor],
        norm: float,
        factor: float,
    ) -> None:
        """Add the losses of one step, and write a line every `LOG_STEPS` steps."""
        for name, loss in losses.items():
            self._sums.setdefault(f"{name}_{frames}", []).append(loss.item())
        if int(progress["step"]) % LOG_STEPS:
            return
        means = {name: round(sum(v) / len(v), 4) for name, v in sorted(self._sums.items())}
        line = progress | {"rate": round(factor, 4), "norm": round(norm, 3)} | means
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._sums.clear()


if __name__ == "__main__":
    main()
