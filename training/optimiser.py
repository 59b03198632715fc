"""Muon for the blocks' matrices, Adam for everything else, on flat buffers.

All parameters, gradients and moments live in flat buffers, which several processes can share: each
process fills its own row of gradients and then updates its own part of the parameters. With one
process this is an ordinary optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.98)
CLIP_NORM = 1.0
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class FlatState:
    """Flat buffers of N parameters: the matrices come first, by owner, then everything else."""

    parameters: Tensor  # [N] fp32
    gradients: Tensor  # [world, N] fp32
    momentum: Tensor  # [N] fp32; Adam's first moment after the matrices
    variance: Tensor  # [N] fp32; Adam's second moment, not used for matrices


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape that are adjacent in the flat buffers, updated by one process."""

    owner: int
    start: int
    shape: tuple[int, int, int]  # count, rows, columns


def new_state(count: int, world: int, device: torch.device) -> FlatState:
    """Return buffers of zeros, in shared memory if they are on the CPU."""
    sizes = ((count,), (world, count), (count,), (count,))
    buffers = [torch.zeros(size, device=device) for size in sizes]
    if device.type == "cpu":
        buffers = [buffer.share_memory_() for buffer in buffers]
    return FlatState(*buffers)


def block_matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that Muon updates, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if "_blocks." in name and parameter.ndim == 2
    }


class FlatOptimiser:
    """Binds a model's parameters to flat buffers and updates this process's part of them.

    Args:
        model: The model, whose parameters become views of the buffers.
        state: The buffers.
        rank: Index of this process.
        world: Number of processes.
        initialise: Whether the model's values are copied into the buffers. Exactly one process
            passes True.
    """

    def __init__(
        self, model: nn.Module, state: FlatState, rank: int, world: int, initialise: bool
    ) -> None:
        self.state, self.rank, self.world = state, rank, world
        order: list[str] = []
        self.stacks: list[Stack] = []
        parameters = dict(model.named_parameters())
        matrices = block_matrices(model)
        start = 0
        for owner in range(world):
            for kind in ("qkv", "proj", "fc1", "fc2"):
                names = [n for n in matrices if f".{kind}." in n]
                names = names[owner::world]
                if not names:
                    continue
                rows, columns = matrices[names[0]].shape
                count = len(names)
                if kind == "qkv":  # queries, keys and values count as three matrices
                    count, rows = 3 * count, rows // 3
                self.stacks.append(Stack(owner, start, (count, rows, columns)))
                order += names
                start += count * rows * columns
        self.matrices_end = start
        order += [name for name in parameters if name not in matrices]
        self.shapes = {name: parameters[name].shape for name in order}
        start = 0
        for name in order:
            parameter = parameters[name]
            flat = slice(start, start + parameter.numel())
            if initialise:
                state.parameters[flat].copy_(parameter.detach().flatten())
            parameter.data = state.parameters[flat].view(parameter.shape)
            parameter.grad = state.gradients[rank, flat].view(parameter.shape)
            start += parameter.numel()

    def moments(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Return views of momentum and variance by parameter name; matrices have no variance."""
        views: dict[str, tuple[Tensor, Tensor | None]] = {}
        start = 0
        for name, shape in self.shapes.items():
            flat = slice(start, start + shape.numel())
            variance = self.state.variance[flat].view(shape) if start >= self.matrices_end else None
            views[name] = (self.state.momentum[flat].view(shape), variance)
            start += shape.numel()
        return views

    def zero_grad(self) -> None:
        """Clear this process's gradients."""
        self.state.gradients[self.rank].zero_()

    @torch.no_grad()
    def step(self, step: int, muon_rate: float, adam_rate: float) -> float:
        """Update this process's parameters from the gradients of all processes.

        Call it after every process has finished its backward pass. No process may start its next
        forward pass before all calls have returned.

        Args:
            step: Number of steps before this one.
            muon_rate: Learning rate of the matrices.
            adam_rate: Learning rate of everything else.

        Returns:
            Norm of the gradient without the matrices. If it is not finite, nothing was updated.
        """
        state, end = self.state, self.matrices_end
        rest = state.gradients[:, end:].mean(dim=0)
        norm = float(rest.norm())
        if not norm < float("inf"):
            return norm
        for stack in self.stacks:
            if stack.owner == self.rank:
                self._muon(stack, muon_rate)
        if self.rank == 0:
            rest *= min(1.0, CLIP_NORM / (norm + 1e-6))
            self._adam(rest, step, adam_rate)
        return norm

    def _muon(self, stack: Stack, rate: float) -> None:
        count, rows, columns = stack.shape
        flat = slice(stack.start, stack.start + count * rows * columns)
        gradient = self.state.gradients[:, flat].mean(dim=0)
        momentum = self.state.momentum[flat].mul_(MOMENTUM).add_(gradient, alpha=1 - MOMENTUM)
        update = gradient.lerp_(momentum, MOMENTUM).view(stack.shape)
        scale = max(1.0, rows / columns) ** 0.5
        update = orthogonalise(update)
        self.state.parameters[flat].add_(update.flatten(), alpha=-rate * scale)

    def _adam(self, gradient: Tensor, step: int, rate: float) -> None:
        end, (first, second) = self.matrices_end, ADAM_BETAS
        mean = self.state.momentum[end:].lerp_(gradient, 1 - first)
        variance = self.state.variance[end:].lerp_(gradient.square(), 1 - second)
        mean = mean / (1 - first ** (step + 1))
        root = (variance / (1 - second ** (step + 1))).sqrt_().add_(1e-8)
        self.state.parameters[end:].addcdiv_(mean, root, value=-rate)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return matrices with singular values near 1, by Newton-Schulz iterations in bf16.

    Args:
        matrices: Matrices `[n, rows, columns]`.

    Returns:
        Matrices of the same shape in fp32.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if tall else x).float()
