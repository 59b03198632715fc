"""Load a model by name: a shipped one, published weights, a checkpoint or a factory."""

from __future__ import annotations

from .load import about, load_model

__all__ = ["about", "load_model"]
