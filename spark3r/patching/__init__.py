"""Put a schedule on a live model in place, and remove it."""

from __future__ import annotations

from .apply import apply, is_applied, remove, replace_attention, verify
from .handle import Handle
from .patch import Patch
from .wall import apply_wall, wall_forward

__all__ = [
    "Handle",
    "Patch",
    "apply",
    "apply_wall",
    "is_applied",
    "remove",
    "replace_attention",
    "verify",
    "wall_forward",
]
