"""The reference model: a small trained model, and the rendered scenes it was trained on."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import ReferenceModel as ReferenceModel
    from .weights import load as load

_HOMES = {
    "ReferenceModel": "spark3r.reference.model",
    "load": "spark3r.reference.weights",
}

__all__ = ["ReferenceModel", "load"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that importing the package stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
