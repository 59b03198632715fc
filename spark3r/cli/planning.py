"""``--memory`` of ``spark3r run``: the plan by which the pass fits."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .arguments import chosen_dtype, parse_size
from .stages import Stages
from .stretch import stretch_of

if TYPE_CHECKING:
    from ..fitting import Plan
    from ..profile import Profile
    from ..runner import Runner

RENDERED_PATCHES = 8
"""Rows and columns of patches of the frames of a rendered scene."""


def add_memory_limit(command: argparse.ArgumentParser) -> None:
    """Declare ``--memory``."""
    command.add_argument(
        "--memory",
        type=parse_size,
        metavar="SIZE",
        help="memory for weights, clip and pass, such as 12GB; a plan that fits is made and "
        "printed before anything is loaded (default: what the device has free)",
    )


def plan_early(
    options: argparse.Namespace, model: str, profile: Profile | None, device: str, stages: Stages
) -> Plan | None:
    """Return the plan of a run before weights and frames are loaded.

    Args:
        options: Options of the command.
        model: Name of a published model.
        profile: The profile, if there is one.
        device: Where the pass is to run.
        stages: What says the plan.

    Returns:
        None if the pass fits as it is by far, or what the device has free is not known.

    Raises:
        FitError: If no plan fits.
    """
    from ..loading.architecture import load_architecture
    from ..runner import Runner

    with stages("plan"):
        return make_plan(options, Runner.of(load_architecture(model)), profile, device, stages)


def make_plan(
    options: argparse.Namespace,
    runner: Runner,
    profile: Profile | None,
    device: str,
    stages: Stages,
) -> Plan | None:
    """Return the plan of a run for a model with or without values, see `plan_early`."""
    from ..errors import Spark3rError
    from ..fitting import FitError, fit, obviously_fits
    from ..io.clips import clip_size
    from ..memory import free_bytes

    room = options.memory or free_bytes(device)
    if room is None:
        return None
    patch_size = runner.family.metadata(runner.root).get("patch_size", 8)
    frames, size = clip_size(
        options.clip,
        runner.family,
        frames=options.frames,
        skip_bad=options.skip_bad,
        rendered_size=RENDERED_PATCHES * patch_size,
        stretch=stretch_of(options),
    )
    if options.memory is None and obviously_fits(runner.root, frames, size, room):
        return None
    try:
        plan = fit(
            runner.root,
            frames=frames,
            size=size,
            memory=room,
            profile=profile,
            schedule=options.schedule,
            dtype=chosen_dtype(options, device),
            device=device,
            family=runner.family,
        )
    except FitError:
        raise
    except Spark3rError as error:
        if options.memory is not None:
            raise
        stages.say(f"note: the run has no plan for its memory ({error})")
        return None
    for line in plan.lines():
        stages.say(f"plan: {line}")
    return plan
