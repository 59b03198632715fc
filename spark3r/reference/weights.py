"""The reference model with shipped, stored or random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from .model import ReferenceModel

SHIPPED_WEIGHTS = Path(__file__).with_name("weights.safetensors")


def load(
    device: torch.device | str = "cpu", weights: str | Path = "shipped", seed: int = 0
) -> ReferenceModel:
    """Return the reference model, in evaluation mode and fp32.

    Args:
        device: Device of the model.
        weights: `"shipped"` for the trained weights in the package, `"random"` for an untrained
            model, or the path of a safetensors file.
        seed: Seed of random weights. The caller's random state does not change.

    Raises:
        FileNotFoundError: If the weights file does not exist.
        ValueError: If the file does not hold this model's parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ReferenceModel()
    if weights != "random":
        _read(model, SHIPPED_WEIGHTS if weights == "shipped" else Path(weights))
    return model.to(device).eval()


def _read(model: ReferenceModel, path: Path) -> None:
    """Copy the parameters of a safetensors file into the model."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}: give the path of a safetensors file, or weights='random' for "
            "an untrained model"
        )
    state = load_file(path)
    expected = model.state_dict()
    if state.keys() != expected.keys() or any(
        state[name].shape != tensor.shape for name, tensor in expected.items()
    ):
        wrong = sorted(state.keys() ^ expected.keys()) or sorted(
            name for name, tensor in expected.items() if state[name].shape != tensor.shape
        )
        raise ValueError(
            f"{path} does not hold the reference model's parameters: {wrong[:3]} differ"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
