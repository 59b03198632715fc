"""``spark3r show``: the schedule of a profile, with its cost, time and memory."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import TYPE_CHECKING, Any

from ..errors import ClipError, ProfileError, printable
from .arguments import add_json, add_profile, grid_text, parse_count, parse_grid, parse_text
from .difference import show_difference
from .listing import summary
from .tables import folded_names, print_table, ranges
from .traffic import count_traffic, print_traffic

if TYPE_CHECKING:
    from ..layout import TokenLayout
    from ..profile import Profile
    from ..profile.estimate import Estimate
    from ..profile.evidence import Timing
    from ..profile.model import OperatorsRecord, ScheduleRecord
    from ..schedule import LengthRule

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

DEFAULT_FRAMES = 256
MOST_COUNTED = 5000
"""Longest clip whose memory is counted."""
DEFAULT_GRID = (28, 37)  # the paper's frames, 518x392 pixels in patches of 14
MOST_TOKENS = 10**8
"""Longest sequence whose keys are counted. A profile by a stranger may ask for any length."""


def add_show(commands: Subparsers) -> None:
    """Declare ``spark3r show``."""
    command = commands.add_parser(
        "show",
        help="print a profile's schedule, with its cost, time and memory at a length",
        allow_abbrev=False,
    )
    add_profile(command)
    command.add_argument(
        "--schedule",
        type=parse_text,
        metavar="NAME",
        help="a schedule of the profile (default: its default)",
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
    command.add_argument(
        "--ranks",
        type=parse_count,
        metavar="N",
        help="also print what N processes that share the clip send one another",
    )
    command.add_argument(
        "--diff",
        type=parse_text,
        metavar="OTHER",
        help="print what differs from another profile and its schedule, instead",
    )
    add_json(command)
    command.set_defaults(run=_show)


def _show(options: argparse.Namespace) -> int:
    from ..layout import TokenLayout
    from ..profile import load_profile

    profile = load_profile(options.profile)
    schedule = profile.schedule(options.schedule)
    if options.diff is not None:
        other = load_profile(options.diff)
        name = options.schedule or other.default
        other.schedule(name)  # raises an error for an unknown name
        show_difference(
            (options.profile, options.diff),
            (profile, other),
            (options.schedule or profile.default, name),
            as_json=options.json,
        )
        return 0
    rows, columns = options.grid or (
        profile.measurements[0].grid if profile.measurements else DEFAULT_GRID
    )
    frames = options.frames or schedule.length.calibrated_frames or DEFAULT_FRAMES
    special = profile.model.special_tokens or 0
    if frames * (rows * columns + special) > MOST_TOKENS:
        raise ClipError(
            f"{frames} frames of {grid_text((rows, columns))} patches are more than {MOST_TOKENS} "
            "tokens: give fewer --frames, or another --grid"
        )
    # For a model without an anchor frame, number 0 affects keep_anchor only.
    layout = TokenLayout(frames, rows, columns, special=special, anchor_frame=0)
    name = options.schedule or profile.default
    cost = _cost(profile, name, layout)
    taken = _taken(profile, name, layout)
    counted = _counted_bytes(profile, name, layout) if options.frames else None
    traffic = None if options.ranks is None else count_traffic(profile, name, layout, options.ranks)
    if options.json:
        record = _record(profile, name)
        sections = {
            "operators": record.operators.model_dump(mode="json"),
            "length": record.length.model_dump(mode="json"),
        }
        print(
            json.dumps(
                summary(options.profile, profile)
                | sections
                | cost
                | _as_json(taken)
                | {"counted_peak_bytes": counted, "ranks": traffic},
                indent=2,
            )
        )
    else:
        _print_head(options.profile, profile, name)
        _print_cost(cost, layout)
        _print_evidence(profile, name)
        _print_taken(taken, layout)
        if isinstance(taken, ProfileError) or taken.peak_gb is None:
            print(f"  {_counted_text(options.profile, profile, layout, counted)}")
        if traffic is not None:
            print_traffic(traffic)
        _print_bounds(schedule.length, layout)
    return 0


def _taken(profile: Profile, name: str, layout: TokenLayout) -> Estimate | ProfileError:
    """Return time and memory of a clip, or why the profile does not tell them."""
    from ..profile.estimate import estimate

    try:
        return estimate(profile, name, layout)
    except ProfileError as error:
        return error


def _as_json(taken: Estimate | ProfileError) -> dict[str, Any]:
    if isinstance(taken, ProfileError):
        return {"estimate": None, "not_estimated": str(taken)}
    return {"estimate": taken.to_dict(), "not_estimated": None}


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

    model, record = profile.model, _record(profile, schedule)
    operators = _operators_text(_operators(record.operators))
    lines = [
        f"{name}: {model.name} (family {model.family}, weights {model.weights or 'unknown'})",
        f"status: {STATUS_WORDS[profile.status]}",
        "" if profile.source is None else f"source: {profile.source}",
        f"notes: {profile.notes}" if profile.notes else "",
        f"schedules: {', '.join(profile.schedule_names())} (default {profile.default})",
        f"operators: {operators}; revision {record.operators.revision}",
        f"length: {_listed(record.length.model_dump(mode='json', exclude_none=True))}",
    ]
    print(printable("\n".join(filter(None, lines))))


def _print_cost(cost: dict[str, Any], layout: TokenLayout) -> None:
    print(
        f"\nschedule '{printable(cost['schedule'])}' on {layout.frames} frames of "
        f"{grid_text((layout.height, layout.width))} patches and {layout.special} special tokens, "
        f"{layout.tokens} tokens in all:\n"
    )
    columns = ["layers", "modules", "query", "key-value", "queries", "keys", "share of dense"]
    groups = _equal_layers(cost["layers"])
    rows = [
        [
            ranges([layer["index"] for layer in group]),
            folded_names([layer["module"] for layer in group]),
            str(group[0]["query"]),
            str(group[0]["key_value"]),
            str(group[0]["query_length"]),
            str(group[0]["key_value_length"]),
            f"{100 * group[0]['share']:.2f}%",
        ]
        for group in groups
    ]
    if any(group[0]["operators"] for group in groups):
        columns.append("own operators")
        for row, group in zip(rows, groups, strict=True):
            row.append(_operators_text(group[0]["operators"]))
    print_table(columns, rows)
    print(f"\nshare of the dense attention cost, mean over layers: {100 * cost['share']:.2f}%")


def _equal_layers(layers: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the layers in groups with equal rules, in the order of their first layers."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        rule = {key: value for key, value in layer.items() if key not in ("index", "module")}
        groups.setdefault(json.dumps(rule), []).append(layer)
    return list(groups.values())


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


def _print_taken(taken: Estimate | ProfileError, layout: TokenLayout) -> None:
    """Print seconds, speed-up and recorded memory with their source, or why they are not known."""
    print(f"\nat {layout.frames} frames:")
    if isinstance(taken, ProfileError):
        print(f"  time and speed-up are not known: {printable(str(taken))}")
        return
    print(
        f"  {taken.seconds:.3g} s per clip, dense {taken.dense_seconds:.3g} s, "
        f"{taken.speed_up:.2f}x end to end"
    )
    where = printable(f"on {taken.device} in {taken.dtype}, {taken.date}")
    if taken.measured:
        print(f"  (measured, {where})")
    else:
        fitted = ", ".join(map(str, taken.fitted_frames))
        print(
            f"  (estimated, {where}: by the profile's latency model, which was fitted to clips of "
            f"{fitted} frames and is off by up to {100 * taken.relative_error:.0f} % on its checks)"
        )
        if layout.frames > taken.known_to:
            print(
                f"  ({layout.frames} frames lie beyond the {taken.known_to} that the latency model "
                "is known to hold for: it was not checked there)"
            )
    if taken.peak_gb is not None:
        print(f"  {_memory_text(taken, layout)}")


def _counted_bytes(profile: Profile, name: str, layout: TokenLayout) -> int | None:
    """Return the counted peak of a pass in bfloat16, None if the model cannot be built here."""
    import torch

    from ..loading.architecture import published_architecture
    from ..memory_count import count_memory
    from ..runner import Runner

    side = profile.model.patch_size
    if side is None or layout.frames > MOST_COUNTED:
        return None
    model = published_architecture(profile.model.family, profile.model.weights)
    if model is None:
        return None
    runner = Runner.of(model)
    alike = tuple(runner.attention) == profile.model.global_layers
    if not alike or runner.family.metadata(runner.root).get("patch_size") != side:
        return None
    size = layout.height * side, layout.width * side
    schedule = profile.schedule(name)
    return count_memory(model, layout.frames, size, schedule=schedule, dtype=torch.bfloat16).total


def _counted_text(source: str, profile: Profile, layout: TokenLayout, counted: int | None) -> str:
    """Return the counted memory of a pass, or the command that counts it where that is possible."""
    model = profile.model
    name = "MODEL"
    if model.weights is not None:
        name = model.weights if model.weights == model.family else f"{model.family}:{model.weights}"
    command = ["spark3r", "memory", name, "--frames", str(layout.frames), "--profile", source]
    by = printable(f"`{shlex.join(command)}`")
    if counted is None:
        return f"memory: {by} counts it where the model's code is installed"
    return f"{counted / 1e9:.3g} GB at the peak, with weights (counted in bfloat16 by {by})"


def _memory_text(taken: Estimate, layout: TokenLayout) -> str:
    dense = "" if taken.dense_peak_gb is None else f", dense {taken.dense_peak_gb:.3g} GB"
    text = f"{taken.peak_gb:.3g} GB peak memory{dense} (measured at {taken.measured_frames} frames)"
    if layout.frames != taken.measured_frames:
        text += f"; the profile does not tell the memory of {layout.frames} frames"
    return text


def _print_bounds(length: LengthRule, layout: TokenLayout) -> None:
    """Say when a clip lies outside the lengths that a schedule is for."""
    if layout.frames < length.min_frames:
        print(f"\nclips of fewer than {length.min_frames} frames run dense under this schedule")
    if length.max_frames is not None and layout.frames > length.max_frames:
        print(
            f"\n{layout.frames} frames are beyond the schedule's max_frames ({length.max_frames}): "
            "it runs, but nothing is known of its quality at this length"
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
