"""What models that were loaded by name are called, so that messages can name them."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

_NAMES: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def remember_name(model: nn.Module, name: str) -> None:
    """Keep, for as long as it lives, what ``--model`` calls a model."""
    _NAMES[model] = name


def name_of(model: nn.Module) -> str | None:
    """Return what ``--model`` calls a model, None for one that was not loaded by name."""
    return _NAMES.get(model)
