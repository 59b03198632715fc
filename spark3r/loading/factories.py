"""Models made by a function of the user's, ``package.module:factory``."""

from __future__ import annotations

import importlib

from torch import nn

from ..errors import FamilyError


def made_by(name: str, module_name: str, attribute: str, accepted: str) -> nn.Module:
    """Call a factory.

    Args:
        name: The model's whole name, for messages.
        module_name: Where the factory is.
        attribute: Its qualified name there.
        accepted: Which names there are, for messages.

    Raises:
        FamilyError: There is no such factory, it fails, or it returns no model.
    """
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
            f"expected {accepted}"
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
