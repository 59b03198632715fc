"""``spark3r show A --diff B``: what differs between two profiles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import printable
from .tables import print_table, ranges

if TYPE_CHECKING:
    from ..profile import Profile
    from ..profile.model import LayerRecord, ScheduleRecord


def show_difference(
    names: tuple[str, str],
    profiles: tuple[Profile, Profile],
    schedules: tuple[str, str],
    *,
    as_json: bool,
) -> None:
    """Print what differs between two profiles and one schedule of each.

    Args:
        names: What the user called the profiles.
        profiles: The profiles.
        schedules: The name of the schedule of each.
        as_json: True prints one JSON object, False tables.
    """
    first, second = (
        next(entry for entry in profile.schedules if entry.name == name)
        for profile, name in zip(profiles, schedules, strict=True)
    )
    fields = {
        name: (one, other)
        for (name, one), (_, other) in zip(
            _fields(profiles[0], first), _fields(profiles[1], second), strict=True
        )
        if one != other
    }
    layers = _layers(first, second)
    if as_json:
        record: dict[str, Any] = {"profiles": list(names), "schedules": list(schedules)}
        print(json.dumps(record | {"fields": fields, "layers": layers}, indent=2))
        return
    heads = [
        printable(f"{name}, '{schedule}'") for name, schedule in zip(names, schedules, strict=True)
    ]
    if fields:
        rows = [[name, _text(one), _text(other)] for name, (one, other) in fields.items()]
        print_table(["", *heads], rows)
        print()
    if not layers:
        print("no layer differs")
        return
    groups: dict[tuple[str, str], list[int]] = {}
    for layer in layers:
        both = (_text(layer["rules"][0]), _text(layer["rules"][1]))
        groups.setdefault(both, []).append(layer["index"])
    print_table(["layers", *heads], [[ranges(group), *both] for both, group in groups.items()])


def _fields(profile: Profile, schedule: ScheduleRecord) -> Iterator[tuple[str, Any]]:
    """Yield what can differ, besides the layers, by name and as JSON."""
    yield "model", profile.model.name
    yield "family", profile.model.family
    yield "weights", profile.model.weights
    yield "status", profile.status
    yield "schedules", list(profile.schedule_names())
    operators = type(schedule.operators).of(schedule.operators.operators())
    for axis, values in operators.model_dump(mode="json", exclude={"revision"}).items():
        yield f"operators, {axis}", values
    yield "length", schedule.length.model_dump(mode="json", exclude_none=True)
    yield "measured on", [f"{entry.device}, {entry.dtype}" for entry in profile.measurements]


def _layers(first: ScheduleRecord, second: ScheduleRecord) -> list[dict[str, Any]]:
    """Return the layers whose rules differ, with both rules; None where a model has no such."""
    count = max(len(first.layers), len(second.layers))
    found = []
    for index in range(count):
        rules = [_rule(entry.layers, index) for entry in (first, second)]
        if rules[0] != rules[1]:
            found.append({"index": index, "rules": rules})
    return found


def _rule(layers: tuple[LayerRecord, ...], index: int) -> dict[str, Any] | None:
    if index >= len(layers):
        return None
    return layers[index].model_dump(
        mode="json", exclude_none=True, exclude={"index", "module", "call"}
    )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(each)}" for key, each in value.items()) or "-"
    if isinstance(value, list):
        return "; ".join(map(_text, value)) or "-"
    return "-" if value is None else printable(str(value))
