"""Applying a schedule or a profile to a live model, and removing it."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..errors import PatchError, Spark3rWarning, printable
from ..families.base import Family
from ..identity import name_of
from ..runner import Runner, autocast
from ..schedule import Schedule
from .handle import Handle
from .patch import PLACE, AttentionReplacement, LayerForward, Patch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..profile import Profile


def apply(
    model: nn.Module,
    profile: str | os.PathLike[str] | Profile | Schedule,
    *,
    schedule: str | None = None,
    family: Family | str | None = None,
    strict: bool = False,
    save_memory: bool = True,
    guard: bool = True,
    group: ProcessGroup | None = None,
) -> Handle:
    """Patch ``model`` in place so that its global attention follows a schedule.

    An earlier schedule is replaced. If anything fails the model is left as it was.

    Args:
        model: A model of a known family, or a module that holds one: ``torch.compile``, PEFT, a
            pipeline of yours.
        profile: The name of a shipped profile, the path of a profile (with a path separator or
            ending in ``.json``), a `Profile`, or a `Schedule`.
        schedule: Name of one of the profile's schedules; None takes its default.
        family: The model's family or the name of one; None recognises it by structure.
        strict: True raises an error where the default is a warning: the weights or the device are
            not those of the profile's evidence. Precision and patch grid belong to a pass; the
            first pass that the evidence does not cover warns of them.
        save_memory: True drops, while the schedule is applied, intermediate results that no head
            of the model reads. Outputs stay the same bit for bit, also in ``disabled()``.
        guard: True compares, in the first eager pass that reduces something, every global attention
            module with what the family computes in its place, on a part of two frames, and the
            order of tokens with the layout. Where they differ that pass raises a PatchError and the
            schedule is removed. Compiled passes are not compared: ``handle.verify(images)`` does
            it.
        group: Process group of ranks that share each clip, such as
            ``torch.distributed.group.WORLD``. Every rank applies the schedule and calls the model
            with its own frames, ``images[handle.share(len(images))]``, without gradients. It gets
            their outputs, as one process would for the whole clip. In ``disabled()`` a rank is
            alone with its frames. None if this process is alone.

    Returns:
        A handle: ``remove()``, ``disabled()``, ``print(handle)``, or ``with apply(...):``.

    Raises:
        ProfileError: If the profile is malformed or unknown.
        FamilyError: If the model is of no known family and none is given, or several ranks cannot
            share a clip of it.
        PatchError: If the schedule does not fit the model, or a schedule is applied and a forward
            pass is under way.
    """
    if not isinstance(model, nn.Module):
        raise PatchError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    runner = Runner.of(model, family)
    if group is not None and group.size() == 1:
        group = None
    if isinstance(profile, Schedule):
        if schedule is not None:
            raise PatchError(
                "schedule= names one of a profile's schedules, but a Schedule was given"
            )
        made = Handle(runner, profile, saves_memory=save_memory, guarded=guard, group=group)
        return made.install()
    from ..profile import load_profile  # pydantic is not needed for a Schedule

    loaded = load_profile(profile)
    chosen = loaded.schedule(schedule)
    _check(loaded, runner, schedule or loaded.default, strict)
    grids = frozenset(entry.grid for entry in loaded.measurements)
    dtypes = frozenset(printable(entry.dtype) for entry in loaded.measurements)  # for warnings
    return Handle(runner, chosen, grids, dtypes, save_memory, guard, group).install()


def verify(runner: Runner, images: Tensor) -> None:
    """Compare a model's own attention with what its family puts in its place, on two frames.

    The model is unpatched afterwards. Callers that apply many schedules do this once, and apply
    them with ``guard=False``.

    Args:
        runner: The model.
        images: A clip ``[S, 3, H, W]`` in [0, 1].

    Raises:
        PatchError: If they differ; see `Handle.verify`.
    """
    dense = Schedule.dense(runner.depth)
    with (
        apply(runner.model, dense, family=runner.family, guard=False) as handle,
        autocast(runner.device, runner.dtype),
    ):
        handle.verify(images[:2])


def replace_attention(runner: Runner, forward: LayerForward) -> Patch:
    """Replace the forward of every global attention module, until the patch is removed.

    An earlier patch or schedule is replaced. If anything fails the model is left as it was.

    Args:
        runner: The model.
        forward: The replacement: ``forward(module, layout, *args, **kwargs)`` with the token layout
            of the pass and the module's own arguments returns the module's output.

    Raises:
        PatchError: If a forward pass is under way.
    """
    return AttentionReplacement(runner, forward).install()


def remove(model: nn.Module) -> None:
    """Remove the schedule or patch from ``model``, or from the model inside it, if there is one."""
    for patch in _patches(model):
        patch.remove()


def is_applied(model: nn.Module) -> bool:
    """Return True if a schedule or patch is applied to ``model``, or to the model inside it."""
    return bool(_patches(model))


def _patches(model: nn.Module) -> list[Patch]:
    places = (module.__dict__.get(PLACE) for module in model.modules())
    return list(dict.fromkeys(place.patch for place in places if place is not None))


def _check(profile: Profile, runner: Runner, schedule: str, strict: bool) -> None:
    from ..profile import compare
    from ..profile.estimate import little_gain

    report = compare(profile, runner.record(), name=name_of(runner.root), device=runner.device)
    problems = report.errors + (report.warnings if strict else ())
    if problems:
        raise PatchError("the profile does not fit the model: " + "; ".join(problems))
    slow = little_gain(profile, schedule)
    for message in (*report.warnings, *([] if slow is None else [slow])):
        warnings.warn(message, Spark3rWarning, stacklevel=3)
