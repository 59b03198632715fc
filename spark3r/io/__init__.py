"""Read footage into clips, and write the files of a reconstruction."""

from __future__ import annotations

from .clips import Footage, check_source, load_clip
from .outputs import new_folder, write_outputs

__all__ = ["Footage", "check_source", "load_clip", "new_folder", "write_outputs"]
