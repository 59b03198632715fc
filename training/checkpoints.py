"""Small training checkpoints: parameters and second moments in fp32, momentum in bf16."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .optimiser import FlatOptimiser


def save_checkpoint(
    path: Path, model: nn.Module, optimiser: FlatOptimiser, progress: dict[str, int | float]
) -> None:
    """Write a checkpoint atomically.

    Args:
        path: The file, replaced if it exists.
        model: Model and auxiliary heads.
        optimiser: Optimiser whose moments are stored. They are stored by parameter name, so that
            another number of processes can resume.
        progress: Numbers to resume from: steps, clips and frames seen, and seconds trained.
    """
    tensors = {f"parameters.{n}": p.detach().cpu().clone() for n, p in model.named_parameters()}
    for name, (momentum, variance) in optimiser.moments().items():
        tensors[f"momentum.{name}"] = momentum.to("cpu", torch.bfloat16)
        if variance is not None:
            # fp32, because second moments span many orders of magnitude.
            tensors[f"variance.{name}"] = variance.to("cpu", torch.float32).clone()
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={key: repr(value) for key, value in progress.items()})
    os.replace(partial, path)


def load_checkpoint(
    path: Path, model: nn.Module, optimiser: FlatOptimiser
) -> dict[str, int | float]:
    """Read a checkpoint into a model and its optimiser.

    Args:
        path: File written by `save_checkpoint`.
        model: Model and auxiliary heads.
        optimiser: The optimiser that is bound to `model`.

    Returns:
        The stored progress.

    Raises:
        KeyError: If the file lacks a parameter.
    """
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"parameters.{name}"])
    for name, (momentum, variance) in optimiser.moments().items():
        momentum.copy_(tensors[f"momentum.{name}"])
        if variance is not None:
            variance.copy_(tensors[f"variance.{name}"])
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return {key: float(v) if "." in v or "e" in v else int(v) for key, v in metadata.items()}


def export_weights(path: Path, model: nn.Module) -> None:
    """Write a model's parameters in half precision atomically."""
    tensors = {name: tensor.detach().half().cpu() for name, tensor in model.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, path)
