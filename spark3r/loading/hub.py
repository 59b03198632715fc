"""Checkpoints on Hugging Face, downloaded only when the user names one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..errors import WeightsError, first_line

_PART = r"[\w-][\w.-]*"  # none starts with a dot, as ".." does
_HUB_NAME = re.compile(
    rf"(?P<repository>[A-Za-z0-9][\w.-]*/{_PART})(/(?P<file>{_PART}(/{_PART})*))?"
    rf"(@(?P<revision>{_PART}(/{_PART})*))?"
)
_USUAL = "model.safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A checkpoint's name on Hugging Face: ``owner/name``, ``/file`` and ``@revision`` optional.

    Attributes:
        repository: ``owner/name``.
        file: File in the repository. None takes ``model.safetensors``, or else the repository's
            only checkpoint.
        revision: Branch, tag or commit. None takes the newest commit of the main branch.
    """

    repository: str
    file: str | None = None
    revision: str | None = None


def parse_hub_name(text: str) -> HubName | None:
    """Return the parts of a name on Hugging Face, None for a text of another form."""
    found = _HUB_NAME.fullmatch(text)
    return None if found is None else HubName(**found.groupdict())


def revision_of(path: Path) -> str | None:
    """Return the commit that a file in Hugging Face's cache is of, None for any other file."""
    folders = path.parts
    for above, folder in pairwise(folders):
        if above == "snapshots" and _COMMIT.fullmatch(folder):
            return folder
    return None


def fetch(name: HubName) -> Path:
    """Return the local copy of a checkpoint, downloaded unless it is in the cache.

    Raises:
        WeightsError: If huggingface_hub is missing, or the download fails.
    """
    shown = name.repository + (f"/{name.file}" if name.file else "")
    shown += f"@{name.revision}" if name.revision else ""
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise WeightsError(
            f"'{shown}' is fetched with huggingface_hub, which is missing: pip install "
            "huggingface_hub; or give the path of a checkpoint on this machine"
        ) from error
    repository, revision = name.repository, name.revision
    try:
        try:
            path = huggingface_hub.hf_hub_download(
                repository, name.file or _USUAL, revision=revision
            )
        except EntryNotFoundError as error:
            if name.file or isinstance(error, LocalEntryNotFoundError):  # Local...: no network
                raise
            files = huggingface_hub.list_repo_files(repository, revision=revision)
            path = huggingface_hub.hf_hub_download(
                repository, _only(repository, files), revision=revision
            )
    except WeightsError:
        raise
    except Exception as error:  # network, access rights, cache: the user must see all of them
        raise WeightsError(
            f"'{shown}' is not a file on this machine, and its download from Hugging Face failed "
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
