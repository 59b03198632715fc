"""``spark3r show``: the schedule of a profile layer by layer, with its cost."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .arguments import add_json, add_profile, grid_text, parse_count, parse_grid
from .listing import summary
from .tables import print_table

if TYPE_CHECKING:
    from ..layout import TokenLayout
    from ..profile import Profile
    from ..profile.evidence import Timing
    from ..profile.model import OperatorsRecord, ScheduleRecord

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DEFAULT_FRAMES = 256
DEFAULT_GRID = (28, 37)  # the paper's frames, 518x392 pixels in patches of 14


def add_show(commands: Subparsers) -> None:
    """Declare ``spark3r show``."""
    command = commands.add_parser(
        "show",
        help="print a profile's schedule layer by layer, with its cost",
        allow_abbrev=False,
    )
    add_profile(command)
    command.add_argument(
        "--schedule", metavar="NAME", help="a schedule of the profile (default: its default)"
    )
    command.add_argument(
        "--frames",
        type=parse_count,
        metavar="N",
        help=f"length of the clip (default: the calibrated length, or {DEFAULT_FRAMES})",
    )
    command.add_argument(
        "--grid",
        type=parse_grid,
        metavar="HxW",
        help="rows and columns of patches per frame (default: the measured grid, or "
        f"{grid_text(DEFAULT_GRID)}, which is 518x392 pixels in patches of 14)",
    )
    add_json(command)
    command.set_defaults(run=_show)


def _show(options: argparse.Namespace) -> int:
    from ..layout import TokenLayout
    from ..profile import load_profile

    profile = load_profile(options.profile)
    schedule = profile.schedule(options.schedule)
    rows, columns = options.grid or (
        profile.measurements[0].grid if profile.measurements else DEFAULT_GRID
    )
    layout = TokenLayout(
        frames=options.frames or schedule.length.calibrated_frames or DEFAULT_FRAMES,
        height=rows,
        width=columns,
        special=profile.model.special_tokens or 0,
        anchor_frame=0,  # for a model without one this affects keep_anchor only
    )
    cost = _cost(profile, options.schedule or profile.default, layout)
    if options.json:
        record = _record(profile, cost["schedule"])
        sections = {
            "operators": record.operators.model_dump(mode="json"),
            "length": record.length.model_dump(mode="json"),
        }
        print(json.dumps(summary(options.profile, profile) | sections | cost, indent=2))
    else:
        _print_head(options.profile, profile, cost["schedule"])
        _print_cost(cost, layout)
        _print_evidence(profile, cost["schedule"])
    return 0


def _cost(profile: Profile, name: str, layout: TokenLayout) -> dict[str, Any]:
    """Return a schedule's realised lengths and cost on a layout, layer by layer."""
    from ..reduction.attention import attention_share
    from ..reduction.plans import key_value_length, query_length

    record = _record(profile, name)
    rules = record.schedule().resolve_within(layout)
    return {
        "schedule": name,
        "frames": layout.frames,
        "grid": [layout.height, layout.width],
        "tokens": layout.tokens,
        "layers": [
            {
                "index": index,
                "module": module,
                "query": rule.query,
                "key_value": rule.key_value,
                "query_length": query_length(layout, rule),
                "key_value_length": key_value_length(layout, rule),
                "share": attention_share([rule], layout),
                "operators": _own_operators(record, index),
            }
            for index, (module, rule) in enumerate(
                zip(profile.model.global_layers, rules, strict=True)
            )
        ],
        "share": attention_share(rules, layout),
    }


def _record(profile: Profile, name: str) -> ScheduleRecord:
    return next(entry for entry in profile.schedules if entry.name == name)


def _own_operators(record: ScheduleRecord, index: int) -> dict[str, Any]:
    """Return the fields of a layer's own operators that differ from the schedule's, by axis."""
    own = record.layers[index].operators
    if own is None:
        return {}
    shared = _operators(record.operators)
    differing = {
        axis: {key: value for key, value in fields.items() if value != shared[axis].get(key)}
        for axis, fields in _operators(own).items()
    }
    return {axis: fields for axis, fields in differing.items() if fields}


def _operators(record: OperatorsRecord) -> dict[str, dict[str, Any]]:
    """Return the operators with all their fields, those that the document leaves out included."""
    complete = type(record).of(record.operators())
    return complete.model_dump(mode="json", exclude={"revision"})


def _print_head(name: str, profile: Profile, schedule: str) -> None:
    from ..profile import STATUS_WORDS

    model = profile.model
    print(f"{name}: {model.name} (family {model.family}, weights {model.weights or 'unknown'})")
    print(f"status: {STATUS_WORDS[profile.status]}")
    if profile.source is not None:
        print(f"source: {profile.source}")
    if profile.notes:
        print(f"notes: {profile.notes}")
    print(f"schedules: {', '.join(profile.schedule_names())} (default {profile.default})")
    record = _record(profile, schedule)
    operators = _operators_text(_operators(record.operators))
    print(f"operators: {operators}; revision {record.operators.revision}")
    print(f"length: {_listed(record.length.model_dump(mode='json', exclude_none=True))}")


def _print_cost(cost: dict[str, Any], layout: TokenLayout) -> None:
    print(
        f"\nschedule '{cost['schedule']}' on {layout.frames} frames of "
        f"{grid_text((layout.height, layout.width))} patches and {layout.special} special tokens, "
        f"{layout.tokens} tokens in all:\n"
    )
    columns = ["layer", "module", "query", "key-value", "queries", "keys", "share of dense"]
    rows = [
        [
            str(layer["index"]),
            layer["module"],
            str(layer["query"]),
            str(layer["key_value"]),
            str(layer["query_length"]),
            str(layer["key_value_length"]),
            f"{100 * layer['share']:.2f}%",
        ]
        for layer in cost["layers"]
    ]
    if any(layer["operators"] for layer in cost["layers"]):
        columns.append("own operators")
        for row, layer in zip(rows, cost["layers"], strict=True):
            row.append(_operators_text(layer["operators"]))
    print_table(columns, rows)
    print(f"\nshare of the dense attention cost, mean over layers: {100 * cost['share']:.2f}%")


def _print_evidence(profile: Profile, schedule: str) -> None:
    rows = [
        (
            entry.device,
            entry.dtype,
            str(entry.frames),
            grid_text(entry.grid),
            _milliseconds(entry.dense.latency),
            f"{entry.wall.median_ms:.1f}",
            f"{run.predicted_ms:.1f}",
            _milliseconds(run.latency),
        )
        for entry in profile.measurements
        for run in entry.schedules
        if run.schedule == schedule
    ]
    if not rows:
        print("\nno latency or quality of this schedule was measured")
        return
    print("\nlatency in ms per clip:\n")
    print_table(
        ("device", "dtype", "frames", "grid", "dense", "wall", "predicted", "measured"), rows
    )


def _milliseconds(latency: Timing | None) -> str:
    return "-" if latency is None else f"{latency.median_ms:.1f}"


def _operators_text(operators: dict[str, dict[str, Any]]) -> str:
    """Return operators as one line, such as ``query unmerge linear; key_value token_stride``."""
    return "; ".join(f"{axis} {_operator_text(**fields)}" for axis, fields in operators.items())


def _operator_text(name: str = "", **fields: Any) -> str:
    return ", ".join(part for part in (name, _listed(fields)) if part)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_plain(value)}" for key, value in values.items())


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
