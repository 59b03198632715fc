"""Models by name, as ``--model`` takes them."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from .errors import FamilyError, WeightsError

ACCEPTED = (
    "'reference' (the small trained model that comes with spark3r), 'reference:random' (the same "
    "untrained), or 'package.module:factory' (a function of yours that returns the model)"
)


def load_model(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a model, in evaluation mode.

    Args:
        name: ``reference``, ``reference:random``, or ``package.module:factory``, where the
            factory is called without arguments and returns the model.
        device: Where the model goes.
        dtype: Precision of its parameters; None leaves it as it is loaded.

    Raises:
        FamilyError: If the name is of no known kind, or the factory gives no model.
        WeightsError: If weights are missing or do not fit.
    """
    kind, _, rest = name.partition(":")
    if kind == "reference":
        model = _reference(name, rest)
    elif rest and all(part.isidentifier() for part in (*kind.split("."), *rest.split("."))):
        model = _made_by(name, kind, rest)
    else:
        raise FamilyError(f"no model is called '{name}', expected {ACCEPTED}")
    return model.to(device=device, dtype=dtype).eval()


def _reference(name: str, variant: str) -> nn.Module:
    from .reference.weights import load

    if variant not in ("", "random"):
        raise FamilyError(f"no model is called '{name}', expected {ACCEPTED}")
    try:
        return load(weights=variant or "shipped")
    except FileNotFoundError as error:
        raise WeightsError(
            f"model '{name}': its trained weights are not installed; 'reference:random' is the "
            "same model untrained"
        ) from error
    except ValueError as error:
        raise WeightsError(f"model '{name}': {error}") from error


def _made_by(name: str, module_name: str, attribute: str) -> nn.Module:
    try:
        factory = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != module_name and not module_name.startswith(f"{missing}."):
            raise FamilyError(
                f"model '{name}': module '{module_name}' needs '{missing}', which is missing"
            ) from error
        raise FamilyError(
            f"model '{name}': there is no module '{missing}' on the Python path; "
            f"expected {ACCEPTED}"
        ) from error
    except Exception as error:
        raise FamilyError(
            f"model '{name}': importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise FamilyError(f"model '{name}': module '{module_name}' has no '{attribute}'")
        factory = getattr(factory, part)
    if not callable(factory) or isinstance(factory, nn.Module):
        raise FamilyError(
            f"model '{name}': '{attribute}' is {_kind(factory)}, expected a function that is "
            "called without arguments and returns the model"
        )
    try:
        model = factory()
    except Exception as error:
        raise FamilyError(
            f"model '{name}': {attribute}() raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise FamilyError(
            f"model '{name}': {attribute}() returned {_kind(model)}, expected a torch.nn.Module"
        )
    return model


def _kind(value: object) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
