"""``spark3r check``: test that a profile is valid, and that it fits a model."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..errors import ProfileError
from .arguments import add_family, add_json, add_model, add_profile, chosen_family

if TYPE_CHECKING:
    from ..families.base import Family
    from ..profile import Profile

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_check(commands: Subparsers) -> None:
    """Declare ``spark3r check``."""
    command = commands.add_parser(
        "check",
        help="check that a profile is valid and that it fits a model",
        allow_abbrev=False,
    )
    add_profile(command)
    add_model(command)
    add_family(command)
    add_json(command)
    command.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    from ..profile import STATUS_WORDS, load_profile

    result: dict[str, Any] = {"profile": options.profile, "model": options.model, "valid": True}
    try:
        profile = load_profile(options.profile)
    except ProfileError as error:
        if options.json:
            result |= {"valid": False, "status": None, "errors": [str(error)], "warnings": []}
            print(json.dumps(result, indent=2))
        raise
    family = chosen_family(options)
    errors, warnings = _fit(profile, options.model, family) if options.model else ((), ())
    if options.json:
        result |= {"status": profile.status, "errors": list(errors), "warnings": list(warnings)}
        print(json.dumps(result, indent=2))
    if errors:
        raise ProfileError(f"{options.profile} does not fit {options.model}: {'; '.join(errors)}")
    if not options.json:
        fits = f" and fits {options.model}" if options.model else ""
        print(f"{options.profile} is valid{fits}; status: {STATUS_WORDS[profile.status]}")
        for warning in warnings:
            print(f"warning: {warning}")
    return 0


def _fit(
    profile: Profile, name: str, family: Family | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    from ..loading.load import load_model
    from ..profile import compare
    from ..runner import Runner

    fit = compare(profile, Runner.of(load_model(name), family).record(), name=name)
    return fit.errors, fit.warnings
