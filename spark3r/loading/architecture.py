"""Architectures by a model's name, without weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import FamilyError
from .load import load_model, published_name, variant_of_name
from .upstream import UPSTREAMS


def load_architecture(name: str) -> nn.Module:
    """Return the architecture that a model's name stands for, in evaluation mode.

    A published model is built on the meta device, and its weights are not fetched. Any other name
    is loaded as it is.

    Args:
        name: Name of the model, see `load_model`.

    Raises:
        FamilyError: If the code is not installed, or the name does not tell the variant.
        WeightsError: If the name is of another kind, and its weights are missing or do not fit.
    """
    if not is_published(name):
        return load_model(name)
    kind, _, weights = name.partition(":")
    try:
        variant = variant_of_name(UPSTREAMS[kind], weights)
        with torch.device("meta"), _ValuesOnCPU():
            model = UPSTREAMS[kind].random(variant)
    except FamilyError as error:
        raise FamilyError(f"model '{name}': {error}") from error
    return model.to("meta").eval()


def is_published(name: str) -> bool:
    """Return True if a model's name is that of a published one, whose weights are not read."""
    kind, _, weights = name.partition(":")
    known = kind in UPSTREAMS and weights != ""
    return known and not os.path.exists(Path(weights).expanduser())


def published_architecture(family: str, weights: str | None) -> nn.Module | None:
    """Return the architecture of the model that a profile names.

    A profile is data from anyone, so only the reference model and published names are followed.

    Args:
        family: Family of the model.
        weights: Source of its weights.

    Returns:
        None for any other name, or if the model's code is not installed.
    """
    if family == weights == "reference":
        return load_model("reference")
    if family not in UPSTREAMS or weights is None or published_name(weights) is None:
        return None
    try:
        return load_architecture(f"{family}:{weights}")
    except FamilyError:
        return None


class _ValuesOnCPU(TorchFunctionMode):
    """A context in which ``torch.linspace`` has values, which constructors of DINOv2 read."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.linspace:
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)
