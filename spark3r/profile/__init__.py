"""Profiles: JSON documents with a model's schedules and the evidence for them.

pydantic lives in this package and nowhere else; torch is not needed to read a profile.
"""

from __future__ import annotations

from .compatibility import Compatibility, compare
from .document import Profile
from .library import load_profile, profile_path, shipped_folder, shipped_names
from .model import STATUS_WORDS, ModelRecord, Status

__all__ = [
    "STATUS_WORDS",
    "Compatibility",
    "ModelRecord",
    "Profile",
    "Status",
    "compare",
    "load_profile",
    "profile_path",
    "shipped_folder",
    "shipped_names",
]
