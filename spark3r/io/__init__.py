"""Read footage into clips, and write the files of a reconstruction."""

from __future__ import annotations

from .clips import Footage, check_source, load_clip
from .exports import export_output
from .outputs import new_folder, write_outputs
from .reading import Output, read_output

__all__ = [
    "Footage",
    "Output",
    "check_source",
    "export_output",
    "load_clip",
    "new_folder",
    "read_output",
    "write_outputs",
]
