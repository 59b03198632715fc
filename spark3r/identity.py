"""The fingerprint of a model's global attention, and the model's record in a profile."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .profile import ModelRecord

_WRAPPERS = ("module", "_orig_mod")  # DDP and torch.compile


def fingerprint(attention: Mapping[str, nn.Module]) -> str | None:
    """Return a hash of the global-attention parameters, or None if they have no values yet.

    The hash covers the index of each layer and, of each of its parameters, the name inside the
    layer, the shape and the values rounded to bfloat16. So it does not change when heads are
    dropped, when the model is wrapped or moved, or when it is cast from float32 to bfloat16. A cast
    to float16 rounds differently and changes it.

    Args:
        attention: Global attention modules by name, in the order of a pass.
    """
    sha = hashlib.sha256()
    for index, module in enumerate(attention.values()):
        parameters = {_canonical(name): value for name, value in module.named_parameters()}
        for name in sorted(parameters):
            value = parameters[name].detach()
            if value.is_meta:
                return None
            sha.update(f"{index}.{name} {list(value.shape)}\n".encode())
            sha.update(memoryview(_bytes(value)))
    return sha.hexdigest()


def describe(
    family: str,
    attention: Mapping[str, nn.Module],
    metadata: Mapping[str, int],
    *,
    name: str | None = None,
    weights: str | None = None,
) -> ModelRecord:
    """Return the record of a live model.

    Args:
        family: Name of the model's family.
        attention: Global attention modules by canonical name, in the order of a pass.
        metadata: ``patch_size`` and ``special_tokens``, where the family knows them.
        name: Name of the model; None takes the family's.
        weights: Origin of the weights, or None.

    Raises:
        ValidationError: If there is no attention module, which is a defect of the family.
    """
    from .profile import ModelRecord  # pydantic is not needed to name a model

    first = next(iter(attention.values()), None)
    return ModelRecord(
        family=family,
        name=family if name is None else name,
        weights=weights,
        width=None if first is None else _width(first),
        heads=getattr(first, "num_heads", None),
        patch_size=metadata.get("patch_size"),
        special_tokens=metadata.get("special_tokens"),
        fingerprint=fingerprint(attention),
        global_layers=tuple(attention),
    )


def _canonical(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _width(attention: nn.Module) -> int | None:
    """Return the input channels of the first projection, the width of a token."""
    matrices = (value for value in attention.parameters() if value.ndim == 2)
    first = next(matrices, None)
    return None if first is None else first.shape[1]


def _bytes(value: Tensor) -> bytes:
    """Return a parameter's values, as bfloat16 if they are floating point, on the CPU."""
    if value.is_floating_point():
        value = value.to(torch.bfloat16)
    return value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Origin:
    """Where a model that was loaded by name comes from.

    Attributes:
        name: Name, as ``--model`` takes it.
        file: Checkpoint that the weights were read from; None for random weights and for what a
            factory made.
        revision: Commit of the checkpoint on Hugging Face, None if it is not from there.
    """

    name: str
    file: Path | None = None
    revision: str | None = None


_ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()


def remember_origin(model: nn.Module, origin: Origin) -> None:
    """Remember where a model comes from, as long as the model lives."""
    _ORIGINS[model] = origin


def origin_of(model: nn.Module) -> Origin | None:
    """Return where a model comes from, None if it was not loaded by name."""
    return _ORIGINS.get(model)


def name_of(model: nn.Module) -> str | None:
    """Return the name by which ``--model`` loaded a model, None if it was not."""
    origin = origin_of(model)
    return None if origin is None else origin.name
