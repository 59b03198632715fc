"""Model families: one file per architecture, and a generic one for all others."""

from __future__ import annotations

from .base import Family, unwrap
from .generic import generic
from .registry import FAMILIES, detect

__all__ = ["FAMILIES", "Family", "detect", "generic", "unwrap"]
