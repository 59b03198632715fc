"""Checkpoint files: reading their tensors without running code, and copying them into a model."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import WeightsError, first_line
from ..memory import is_out_of_memory
from .inspection import inspect_pickled, inspect_safetensors

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLED)
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")  # keys that hold the tensors
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of wrappers, in every name


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, without the prefixes of wrappers.

    No code in the file is run: the file is safetensors, or a pickle read with ``weights_only``.

    Raises:
        WeightsError: If the file is missing, damaged, of another kind, or holds code.
    """
    if not os.path.isfile(path):  # unlike Path's method it takes any path, and a pipe is no file
        raise WeightsError(f"there is no file {path}")
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{path} is not a checkpoint: expected one of {', '.join(SUFFIXES)}")
    content = _safetensors(path) if path.suffix == ".safetensors" else _pickle(path)
    for key in _WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, Mapping):
            content = inner
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        shown = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise WeightsError(f"{path} holds no named tensors (it holds {shown})")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
    return tensors


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder of weights.

    Hugging Face keeps the files of a folder ``snapshots/REVISION`` in ``blobs`` beside
    ``snapshots``, and links them. Any other link that leads out of the folder is refused: whoever
    made the folder could have it read a file of yours.

    Raises:
        WeightsError: If the file is such a link.
    """
    path = folder / name
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(target.is_relative_to(each) for each in homes):
        raise WeightsError(
            f"{path} is a link that leads out of its folder, to {target}: if you trust it, give "
            "that path"
        )
    return path


def _safetensors(path: Path) -> Mapping[str, Any]:
    inspect_safetensors(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error}): download it again, it may be "
            "truncated"
        ) from error


def _pickle(path: Path) -> Mapping[str, Any]:
    try:
        inspect_pickled(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; the error below says it
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (WeightsError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors: reading it would run code of its author's choice, "
            "which spark3r does not do. If you trust it, load it yourself and save its "
            "state_dict() as safetensors"
        ) from error
    except Exception as error:  # a damaged pickle ends in an error of almost any class
        if is_out_of_memory(error):
            raise WeightsError(f"{path}: memory is not enough for its tensors") from error
        raise WeightsError(
            f"{path} is not a whole PyTorch checkpoint ({first_line(error)}): download it again, "
            "it may be truncated"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"{path} holds an object of type {type(content).__name__}, expected named tensors"
        )
    return content


def fill(model: nn.Module, tensors: Mapping[str, Tensor], what: str, unused: Iterable[str]) -> None:
    """Copy a checkpoint's tensors into a model.

    Args:
        model: The model; its tensors keep their precision.
        tensors: Tensors of the checkpoint by name.
        what: Name of the checkpoint in messages.
        unused: Prefixes of the tensors of parts that the model is built without.

    Raises:
        WeightsError: If tensors are missing, unknown or of another shape; the model is unchanged.
    """
    unused = tuple(unused)
    wanted = model.state_dict()
    given = {name: value for name, value in tensors.items() if not name.startswith(unused or "\n")}
    given.update(_under_other_names(wanted, given))
    problems = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unknown": sorted(given.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {list(given[name].shape)} for {list(value.shape)}"
            for name, value in wanted.items()
            if name in given and given[name].shape != value.shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:2])}{' ...' * (len(names) > 2)})"
            for kind, names in problems.items()
            if names
        )
        raise WeightsError(
            f"{what} does not fit {type(model).__name__}: of {len(wanted)} tensors {found}; it is "
            "a checkpoint of another version or size"
        )
    model.load_state_dict(given)


def _under_other_names(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return tensors by the names that a checkpoint leaves out.

    A module that is in a model twice has two names, and safetensors stores its tensors under one.
    """

    def place(value: Tensor) -> tuple[int, torch.Size]:
        return value.data_ptr(), value.shape

    known = {place(wanted[name]): given[name] for name in wanted.keys() & given.keys()}
    missing = {name: place(value) for name, value in wanted.items() if name not in given}
    return {name: known[where] for name, where in missing.items() if where[0] and where in known}
