"""Rendered clips on disk, so that another calibration does not render them again.

A clip is stored under its seed, frames and size, in a folder named by a hash of the renderer's
source and PyTorch's version. The folder is bounded in size: the files that were not used for the
longest time go first. What cannot be read is rendered again, and what cannot be written is not
stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from spark3r.clips import Clip
from spark3r.files import write_file
from spark3r.reference import scenes

MOST_BYTES = 300_000_000
"""Largest size of all stored clips: those of `thorough` take 110 MB."""

_FIELDS = ("images", "intrinsics", "depth", "extrinsics")


def stored_clip(folder: Path, name: str, render: Callable[[], Clip]) -> Clip:
    """Return a rendered clip from its file, or render and store it.

    Args:
        folder: The cache folder. It is created if it is missing.
        name: Name of the file: seed, frames and size.
        render: Function that renders the clip.
    """
    path = folder / "rendered" / revision() / f"{name}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, RuntimeError):
        tensors = load(path.read_bytes())
        os.utime(path)  # used just now
        seed = name.partition("-")[0]
        return Clip(f"rendered:{seed}", *(tensors[field] for field in _FIELDS))
    clip = render()
    tensors = {field: getattr(clip, field) for field in _FIELDS}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, save({field: each.contiguous() for field, each in tensors.items()}))
        _bound(path.parent)
    return clip


@cache
def revision() -> str:
    """Return a hash of everything that a rendered clip depends on, besides its name."""
    sha = hashlib.sha256(torch.__version__.encode())
    for path in sorted(Path(scenes.__path__[0]).glob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


def _bound(folder: Path) -> None:
    """Remove the clips of other revisions, and of this one those that are too many."""
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    files = [(each.stat().st_mtime, each.stat().st_size, each) for each in folder.iterdir()]
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= MOST_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size
