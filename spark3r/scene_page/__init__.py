"""The page of a scene: one HTML file with the cloud, the cameras and the frames, to look at."""

from .page import MAX_BYTES, POINTS, write_scene

__all__ = ["MAX_BYTES", "POINTS", "write_scene"]
