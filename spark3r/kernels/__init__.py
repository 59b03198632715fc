"""Kernels that are tried before they are trusted, each with a plain implementation beside it."""

from __future__ import annotations

from .trials import Choice, choices, choices_for, forced

__all__ = ["Choice", "choices", "choices_for", "forced"]
