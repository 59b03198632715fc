"""Write a reconstruction in the formats of other programs: COLMAP, nerfstudio, GLB."""

from __future__ import annotations

from .export import FORMATS, Export, export_output

__all__ = ["FORMATS", "Export", "export_output"]
