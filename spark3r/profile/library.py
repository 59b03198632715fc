"""Finding profiles: shipped ones by name, others by path."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from ..errors import ProfileError
from .document import Profile

_PACKAGE = Path(__file__).parents[1]


def shipped_folder() -> Path:
    """Return the folder of the shipped profiles: in the wheel, or in a checkout."""
    installed = _PACKAGE / "_profiles"
    return installed if installed.is_dir() else _PACKAGE.parent / "profiles"


def shipped_names() -> tuple[str, ...]:
    """Return the names of the shipped profiles, in alphabetical order."""
    return tuple(sorted(path.stem for path in shipped_folder().glob("*.json")))


def load_profile(source: str | os.PathLike[str] | Profile) -> Profile:
    """Return a profile.

    Args:
        source: A profile, which is returned as it is; a path; or the name of a shipped profile. A
            string is a path if it has a path separator or ends in ``.json``.

    Raises:
        ProfileError: If the file is missing or not a valid profile.
    """
    if isinstance(source, Profile):
        return source
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise ProfileError(f"a profile cannot be a {kind}, expected a name, a path or a Profile")
    return Profile.load(profile_path(source))


def profile_path(source: str | os.PathLike[str]) -> Path:
    """Return the file of a profile. A path is returned as it is, and the file may be missing.

    Args:
        source: A path, or the name of a shipped profile; see `load_profile`.

    Raises:
        ProfileError: If no shipped profile has that name.
    """
    if not isinstance(source, str) or _is_path(source):
        return Path(source)
    names = shipped_names()
    if source not in names:
        near = difflib.get_close_matches(source.lower(), names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        if os.path.isfile(source):
            hint = f"did you mean the file './{source}'? "
        raise ProfileError(
            f"no shipped profile is named '{source}': {hint}`spark3r list` shows all; "
            "the name of a file has a path separator or ends in .json"
        )
    return shipped_folder() / f"{source}.json"


def _is_path(source: str) -> bool:
    separators = {"/", os.sep, os.altsep or os.sep}
    return source.endswith(".json") or any(mark in source for mark in separators)
