"""``spark3r list``: the shipped profiles."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .arguments import add_json
from .tables import print_table

if TYPE_CHECKING:
    from ..profile import Profile, Status

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_STATUS_STYLES: dict[Status, str] = {
    "measured": "bold green",
    "paper": "yellow",
    "prior": "magenta",
}


def add_list(commands: Subparsers) -> None:
    """Declare ``spark3r list``."""
    command = commands.add_parser("list", help="list the shipped profiles", allow_abbrev=False)
    add_json(command)
    command.set_defaults(run=_list)


def _list(options: argparse.Namespace) -> int:
    from ..profile import STATUS_WORDS, load_profile, shipped_names

    profiles = {name: load_profile(name) for name in shipped_names()}
    if options.json:
        print(json.dumps({"profiles": [summary(*item) for item in profiles.items()]}, indent=2))
        return 0
    print_table(
        ("profile", "status", "model", "global layers", "schedules", "weights"),
        [
            (
                name,
                STATUS_WORDS[profile.status],
                profile.model.name,
                str(len(profile.model.global_layers)),
                ", ".join(profile.schedule_names()),
                profile.model.weights or "unknown",
            )
            for name, profile in profiles.items()
        ],
        {STATUS_WORDS[status]: style for status, style in _STATUS_STYLES.items()},
    )
    return 0


def summary(name: str, profile: Profile) -> dict[str, Any]:
    """Return the head of a profile as JSON values."""
    return {
        "profile": name,
        "status": profile.status,
        "source": profile.source,
        "family": profile.model.family,
        "model": profile.model.name,
        "weights": profile.model.weights,
        "global_layers": len(profile.model.global_layers),
        "schedules": list(profile.schedule_names()),
        "default": profile.default,
    }
