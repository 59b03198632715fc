"""Put a schedule on a live model in place, and take it off again."""

from __future__ import annotations

from .handle import Handle
from .patch import apply, is_applied, remove
from .wall import apply_wall, wall_family

__all__ = ["Handle", "apply", "apply_wall", "is_applied", "remove", "wall_family"]
