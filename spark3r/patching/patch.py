"""Applying a schedule or a profile to a live model, and taking it off again."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType
from typing import TYPE_CHECKING

from torch import nn

from ..errors import FamilyError, PatchError, Spark3rWarning
from ..families.base import Family, unwrap
from ..families.registry import FAMILIES, detect
from ..identity import name_of
from ..schedule import Schedule
from .handle import HANDLE, Handle

if TYPE_CHECKING:
    from ..profile import Profile


def apply(
    model: nn.Module,
    profile: str | os.PathLike[str] | Profile | Schedule,
    *,
    schedule: str | None = None,
    family: Family | str | None = None,
    strict: bool = False,
    save_memory: bool = True,
) -> Handle:
    """Patch ``model`` in place so that its global attention follows a schedule.

    Applying again replaces the earlier schedule. If anything fails the model is left as it was.

    Args:
        model: A model of a known family, wrapped by ``torch.compile`` or data parallelism or not.
        profile: A shipped profile's name, the path of one (with a path separator or ending in
            ``.json``), a `Profile`, or a `Schedule`.
        schedule: Which of a profile's schedules; None takes its default.
        family: What is known of the model, or a family's name; None recognises it by structure.
        strict: Refuse what would otherwise be a warning: other weights or another device than the
            profile's evidence. Precision and patch grid are those of a pass, and are warned of in
            the first one that the evidence does not cover.
        save_memory: Drop, while the schedule is applied, what the family knows that no head of the
            model reads. Outputs stay the same bit for bit, also in ``disabled()``.

    Returns:
        A handle: ``remove()``, ``disabled()``, ``print(handle)``, or ``with apply(...):``.

    Raises:
        ProfileError: If the profile is malformed or unknown.
        FamilyError: If the model is of no known family and none is given.
        PatchError: If the schedule does not fit the model, or a forward pass is under way.
    """
    if not isinstance(model, nn.Module):
        raise PatchError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    root = unwrap(model)
    _refuse_inside_forward(root)
    if isinstance(family, str):
        if family not in FAMILIES:
            raise FamilyError(
                f"no family is named '{family}', expected one of: {', '.join(FAMILIES)}"
            )
        family = FAMILIES[family]
    family = detect(root) if family is None else family
    if isinstance(profile, Schedule):
        if schedule is not None:
            raise PatchError(
                "schedule= names one of a profile's schedules, but a Schedule was given"
            )
        chosen, grids, dtypes = profile, frozenset[tuple[int, int]](), frozenset[str]()
    else:
        from ..profile import load_profile  # pydantic is not needed for a Schedule

        loaded = load_profile(profile)
        chosen = loaded.schedule(schedule)
        _check(loaded, root, family, strict)
        grids = frozenset(entry.grid for entry in loaded.measurements)
        dtypes = frozenset(entry.dtype for entry in loaded.measurements)

    handle = Handle(root, family, chosen, grids, dtypes, save_memory)
    if len(chosen.layers) != len(handle.layers):
        raise PatchError(
            f"the schedule has {len(chosen.layers)} layer rules, but {type(root).__name__} has "
            f"{len(handle.layers)} global attention layers"
        )
    earlier: Handle | None = root.__dict__.get(HANDLE)
    if earlier is not None:
        earlier.remove()
    try:
        handle.install()
    except BaseException:
        if earlier is not None:
            earlier.install()
        raise
    return handle


def remove(model: nn.Module) -> None:
    """Take whatever schedule is applied off ``model``; without one, do nothing."""
    handle: Handle | None = unwrap(model).__dict__.get(HANDLE)
    if handle is not None:
        handle.remove()


def is_applied(model: nn.Module) -> bool:
    """Whether a schedule is applied to ``model``."""
    return HANDLE in unwrap(model).__dict__


def _check(profile: Profile, root: nn.Module, family: Family, strict: bool) -> None:
    from ..identity import describe
    from ..profile import compare

    attention = family.attention(root)
    record = describe(family.name, attention, family.facts(root))
    parameter = next(iter(root.parameters()), None)
    device = None if parameter is None else parameter.device
    report = compare(profile, record, name=name_of(root), device=device)
    problems = report.errors + (report.warnings if strict else ())
    if problems:
        raise PatchError("the profile does not fit the model: " + "; ".join(problems))
    for message in report.warnings:
        warnings.warn(message, Spark3rWarning, stacklevel=3)


def _refuse_inside_forward(root: nn.Module) -> None:
    """Raise if one of the model's modules is running in this thread."""
    modules = {id(module) for module in root.modules()}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and id(frame.f_locals.get("self")) in modules:
            raise PatchError(
                f"a forward pass of {type(root).__name__} is under way: apply before or after it"
            )
        frame = frame.f_back
