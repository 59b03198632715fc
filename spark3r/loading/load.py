"""Models by name, as ``--model`` takes them."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import FamilyError, WeightsError, first_line
from ..families.base import unwrap
from ..families.registry import FAMILIES
from ..identity import Origin, remember_origin
from ..runner import Runner
from . import lingbot
from .checkpoints import SUFFIXES, fill, inside, read_checkpoint
from .hub import HubName, fetch, parse_hub_name, revision_of
from .upstream import UPSTREAMS, Upstream

__all__ = ["About", "about", "load_model"]

ACCEPTED = (
    "'reference' (the small trained model that comes with spark3r), 'reference:random' (the same "
    "untrained), 'FAMILY:WEIGHTS' or 'FAMILY:random' with one of "
    f"{', '.join(UPSTREAMS)} (such as 'vggt:facebook/VGGT-1B', 'omega:weights.pt' or "
    "'da3:random-small'; '@REVISION' after a name on Hugging Face takes that branch, tag or "
    "commit), or 'package.module:factory' (a function of yours that returns the model)"
)

REFERENCE_IS_FOR = (
    "the reference model is for trying spark3r: it sees about 64x64 pixels and was trained on "
    "rendered rooms, so do not rely on its depth and poses of real footage"
)


@dataclass(frozen=True)
class About:
    """The weights behind a model's name.

    Attributes:
        weights: Origin of the weights, as profiles record it; ``random`` if they are random.
        random: True if they are random, so that depth and poses are meaningless.
        licence: Licence of the weights, "" if it is not known or there are none.
        notice: One line for the user of the model, "" if there is none.
    """

    weights: str
    random: bool = False
    licence: str = ""
    notice: str = ""


def about(name: str) -> About:
    """Return what a model's name says about its weights, without loading them."""
    kind, _, rest = name.partition(":")
    if rest.partition("-")[0] == "random" and kind in (*UPSTREAMS, "reference"):
        return About(
            "random",
            random=True,
            notice=f"{name} has random weights: its time and memory are meaningful, its depth, "
            "poses and quality are not",
        )
    if name == "reference":
        return About(name, licence="Apache-2.0")
    if kind in UPSTREAMS and rest:
        upstream, published = UPSTREAMS[kind], published_name(rest)
        licence = upstream.weights_licence(published.repository) if published else ""
        terms = licence or "under their own terms"
        if published and not licence:
            terms = f"see https://huggingface.co/{published.repository}"
        return About(
            rest,
            licence=licence,
            notice=f"{upstream.title}, code: {upstream.licence}; weights {rest}: {terms}",
        )
    return About(name)


def offered(family: str | None = None) -> str:
    """Return the models that real footage can be given to, and what each needs, line by line.

    Args:
        family: The only family to name; None, or one without published weights, names all.
    """
    lines = []
    for upstream in (UPSTREAMS[family],) if family in UPSTREAMS else UPSTREAMS.values():
        lines += [
            f"  --model {upstream.family}:{upstream.example}",
            f"      {upstream.example_gb:.1f} GB of weights, {upstream.example_licence}; its code "
            + ("is not installed:" if upstream.installed is None else "is installed"),
        ]
        if upstream.installed is None:
            lines.append(f"      {upstream.install}")
    if family not in UPSTREAMS:
        lines += [
            "  --model reference",
            "      comes with spark3r, but is for trying it: it sees about 64x64 pixels",
            "      and was trained on rendered rooms",
        ]
    return "\n".join(lines)


def load_model(name: str, device: torch.device | str = "cpu") -> nn.Module:
    """Load a model, in evaluation mode.

    Args:
        name: ``reference``, ``reference:random``; ``FAMILY:WEIGHTS`` where the weights are a
            checkpoint's path or a name on Hugging Face, optionally with ``@REVISION`` (a branch,
            tag or commit); ``FAMILY:random`` or ``FAMILY:random-VARIANT``; or
            ``package.module:factory``, where the factory is called without arguments and returns
            the model.
        device: Device of the model, default ``cpu``.

    Raises:
        FamilyError: If the name is of no known kind, the model's own code is missing or of another
            version than spark3r knows, or a factory does not return a model.
        WeightsError: If weights are missing or do not fit.
    """
    kind, _, rest = name.partition(":")
    file: Path | None = None
    if kind == "reference":
        model, file = _reference(name, rest)
    elif kind in UPSTREAMS and rest:
        model, file = _published(name, UPSTREAMS[kind], rest)
    elif rest and all(part.isidentifier() for part in (*kind.split("."), *rest.split("."))):
        model = made_by(name, kind, rest, ACCEPTED)
    elif kind.lower() in UPSTREAMS:
        raise FamilyError(_weights_unnamed(name, UPSTREAMS[kind.lower()]))
    else:
        expected = f", expected {ACCEPTED}"
        if not rest and (name.endswith(SUFFIXES) or parse_hub_name(name)):
            expected = f": name the family of these weights too, such as vggt:{name}"
        raise FamilyError(f"no model is called '{name}'{expected}")
    model = _moved(name, model, device).eval()
    remember_origin(unwrap(model), Origin(name, file, revision_of(file) if file else None))
    return model


def _weights_unnamed(name: str, upstream: Upstream) -> str:
    family, _, weights = name.partition(":")
    example = weights or upstream.example
    return f"model '{name}': expected {family.lower()}:{example}" + (
        "" if weights else f", the path of a checkpoint, or {upstream.family}:random"
    )


def _reference(name: str, variant: str) -> tuple[nn.Module, Path | None]:
    from ..reference import weights

    if variant not in ("", "random"):
        raise FamilyError(f"no model is called '{name}', expected {ACCEPTED}")
    try:
        model = weights.load(weights=variant or "shipped")
    except FileNotFoundError as error:
        raise WeightsError(
            f"model '{name}': its trained weights are not installed; 'reference:random' is the "
            "same model untrained"
        ) from error
    except ValueError as error:
        raise WeightsError(f"model '{name}': {error}") from error
    return model, None if variant else weights.SHIPPED_WEIGHTS


def _published(name: str, upstream: Upstream, weights: str) -> tuple[nn.Module, Path | None]:
    """Build one of the published architectures, and return it with its checkpoint, if any."""
    path: Path | None = None
    try:
        if weights.partition("-")[0] == "random":
            model = upstream.random(_variant(upstream, weights))
        else:
            model, path = _with_checkpoint(upstream, weights)
        found = Runner.of(model).family
    except (FamilyError, WeightsError) as error:
        raise type(error)(f"model '{name}': {error}") from error
    if found is not FAMILIES[upstream.family]:
        raise FamilyError(f"model '{name}' is of family {found.name}, not {upstream.family}")
    return model, path


def _variant(upstream: Upstream, text: str) -> str:
    variant = text.partition("-")[2] or upstream.variants[0]
    if variant not in upstream.variants:
        known = ", ".join(f"{upstream.family}:random-{known}" for known in upstream.variants)
        raise FamilyError(f"there is no variant '{variant}' of {upstream.title}, expected {known}")
    return variant


def variant_of_name(upstream: Upstream, weights: str) -> str:
    """Return the variant that a name of weights tells, without reading them.

    Args:
        upstream: The architecture.
        weights: ``random``, ``random-VARIANT``, or the name of published weights.

    Raises:
        FamilyError: If there is no such variant, or the name does not tell it.
    """
    if weights.partition("-")[0] == "random":
        return _variant(upstream, weights)
    # The nested network of Depth-Anything-3 has the names of its two parts in its own.
    told = [each for each in upstream.variants if each in weights.lower()]
    longest = sorted(told, key=lambda each: (each == "nested", len(each)))
    if longest:
        return longest[-1]
    if len(upstream.variants) == 1:
        return upstream.variants[0]
    if upstream.untold is not None:
        return upstream.untold
    known = " or ".join(f"{upstream.family}:random-{known}" for known in upstream.variants)
    raise FamilyError(f"the name does not tell the variant of {upstream.title}: give {known}")


def _with_checkpoint(upstream: Upstream, weights: str) -> tuple[nn.Module, Path]:
    upstream.require()
    path = _checkpoint_path(upstream, weights)
    tensors = read_checkpoint(path)
    variant = upstream.variant_of(tensors)
    if variant is None:
        others = [u for u in UPSTREAMS.values() if u is not upstream and u.variant_of(tensors)]
        looks = (
            f"it looks like a checkpoint of {others[0].title}: try {others[0].family}:{weights}"
            if others
            else f"its tensors are named {', '.join(sorted(tensors)[:3])} ..."
        )
        raise WeightsError(f"{path} is not a checkpoint of {upstream.title}; {looks}")
    model = upstream.random(variant)
    fill(model, tensors, str(path), upstream.unused)
    named = path.name if os.path.exists(Path(weights).expanduser()) else weights
    if upstream.family == "vggt" and lingbot.NAME in named.lower():
        lingbot.read_cameras(model)
    return model, path


def _checkpoint_path(upstream: Upstream, weights: str) -> Path:
    path = Path(weights).expanduser()
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        return inside(path, "model.safetensors")
    published = published_name(weights)
    if published:
        return fetch(published)
    raise WeightsError(
        f"'{weights}' is neither a file nor a name on Hugging Face, expected a checkpoint "
        f"({', '.join(SUFFIXES)}), a name such as {upstream.example}, or "
        f"random-{upstream.variants[0]}"
    )


def published_name(weights: str) -> HubName | None:
    """Return the parts of a name on Hugging Face, None for a path on this machine."""
    if os.path.exists(Path(weights).expanduser()):
        return None
    if weights.count("/") == 1 and weights.endswith(SUFFIXES):
        return None  # a file in a folder here, misspelt
    return parse_hub_name(weights)


def _moved(name: str, model: nn.Module, device: torch.device | str) -> nn.Module:
    try:
        return model.to(device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise FamilyError(
            f"model '{name}' cannot be moved to device '{device}': {first_line(error)}"
        ) from error


def made_by(name: str, module_name: str, attribute: str, accepted: str) -> nn.Module:
    """Call a factory.

    Args:
        name: The model's whole name, for messages.
        module_name: Module of the factory.
        attribute: Qualified name of the factory in that module.
        accepted: The kinds of names there are, for messages.

    Raises:
        FamilyError: If there is no such factory, it fails, or it does not return a model.
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
