"""Checkpoints on Hugging Face, downloaded only when the user names one."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import WeightsError, first_line

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[\w./-]+)?")
"""``owner/name``, or ``owner/name/file``."""

_USUAL = "model.safetensors"


def fetch(name: str) -> Path:
    """Return the local copy of a checkpoint, downloaded unless it is in the cache.

    Args:
        name: ``owner/name`` takes ``model.safetensors``, or else the repository's only checkpoint;
            ``owner/name/file`` takes that file.

    Raises:
        WeightsError: If huggingface_hub is missing, or the download fails.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise WeightsError(
            f"'{name}' is fetched with huggingface_hub, which is missing: pip install "
            "huggingface_hub; or give the path of a checkpoint on this machine"
        ) from error
    owner, repository, *file = name.split("/", 2)
    repository = f"{owner}/{repository}"
    try:
        try:
            path = huggingface_hub.hf_hub_download(repository, file[0] if file else _USUAL)
        except EntryNotFoundError as error:
            if file or isinstance(error, LocalEntryNotFoundError):  # LocalEntry...: no network
                raise
            files = huggingface_hub.list_repo_files(repository)
            path = huggingface_hub.hf_hub_download(repository, _only(repository, files))
    except WeightsError:
        raise
    except Exception as error:  # network, access rights, cache: the user must see all of them
        raise WeightsError(
            f"'{name}' is not a file on this machine, and its download from Hugging Face failed "
            f"({type(error).__name__}: {first_line(error)[:200]}). For a gated "
            "model, accept its terms there and run `hf auth login`; without a network, give the "
            "path of a checkpoint"
        ) from error
    return Path(path)


def _only(repository: str, files: list[str]) -> str:
    from .checkpoints import SUFFIXES

    found = [file for file in files if file.endswith(SUFFIXES)]
    if len(found) != 1:
        choice = f"several ({', '.join(found)}): name {repository}/FILE" if found else "none"
        raise WeightsError(f"'{repository}' has no {_USUAL}; of other checkpoints it has {choice}")
    return found[0]
