"""Rules between the fields of a profile. A JSON Schema cannot state them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..errors import ScheduleError
from .evidence import Measurement, Run, Sensitivity
from .messages import shown
from .model import ModelRecord, OperatorsRecord, ScheduleRecord, Status, earlier_calls


def validate(
    model: ModelRecord,
    default: str,
    schedules: Sequence[ScheduleRecord],
    measurements: Sequence[Measurement],
    sensitivity: Sequence[Sensitivity],
) -> Iterator[str]:
    """Yield one line per contradiction between sections that are valid by themselves."""
    names = [record.name for record in schedules]
    layers = len(model.global_layers)
    yield from _repeated(names, "schedules", ".name")
    if default not in names:
        yield f"default is {shown(default)}, expected one of: {', '.join(names)}"
    for index, record in enumerate(schedules):
        yield from _schedule(record, model, f"schedules[{index}]")
    for index, measurement in enumerate(measurements):
        yield from _measurement(measurement, names, layers, f"measurements[{index}]")
    for index, table in enumerate(sensitivity):
        yield from _sensitivity(table, layers, f"sensitivity[{index}]")


def validate_status(
    status: Status,
    source: str | None,
    notes: str,
    fingerprint: str | None,
    schedules: Sequence[str],
    measurements: Sequence[Measurement],
) -> Iterator[str]:
    """Yield one line per field that does not agree with the status of a profile.

    Args:
        status: Status of the profile.
        source: Source of the profile.
        notes: Notes of the profile.
        fingerprint: Fingerprint of the model.
        schedules: Names of the schedules.
        measurements: Measurements of the schedules.
    """
    if status == "measured":
        if fingerprint is None:
            yield 'model.fingerprint is null, expected a fingerprint with status "measured"'
        measured = {run.schedule for entry in measurements for run in entry.schedules}
        for index, name in enumerate(schedules):
            if name not in measured:
                yield (
                    f"schedules[{index}] {shown(name)} is in no measurement, expected one "
                    'with status "measured"'
                )
        return
    if measurements:
        yield (
            f'measurements is a list of {len(measurements)}, expected none with status "{status}"'
        )
    if source is None:
        yield f'source is null, expected a citation with status "{status}"'
    if status == "prior" and not notes.strip():
        yield 'notes is empty, expected the rule that was followed, with status "prior"'


def _repeated(names: Iterable[str], path: str, key: str) -> Iterator[str]:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            yield f"{path}[{index}]{key} is {shown(name)} a second time, expected another name"
        seen.add(name)


def _schedule(record: ScheduleRecord, model: ModelRecord, path: str) -> Iterator[str]:
    modules = model.global_layers
    if len(record.layers) != len(modules):
        yield (
            f"{path}.layers is a list of {len(record.layers)}, expected one rule for each of the "
            f"model's {len(modules)} global layers"
        )
    yield from _operators(record.operators, path)
    for index, (layer, module, call) in enumerate(
        zip(record.layers, modules, earlier_calls(modules), strict=False)
    ):
        at = f"{path}.layers[{index}]"
        if layer.index != index:
            yield f"{at}.index is {layer.index}, expected {index}"
        if layer.module != module:
            yield (
                f"{at}.module is {shown(layer.module)}, expected {shown(module)} as in "
                f"model.global_layers[{index}]"
            )
        elif layer.call != call:
            yield (
                f"{at}.call is {layer.call}, expected {call}, the number of entries "
                f"{shown(module)} before model.global_layers[{index}]"
            )
        if layer.operators is not None:
            yield from _operators(layer.operators, at)
    try:
        record.length.length_rule()
    except ScheduleError as error:
        yield f"{path}.length: {error}"


def _operators(record: OperatorsRecord, path: str) -> Iterator[str]:
    try:
        record.operators()
    except ScheduleError as error:
        yield f"{path}.operators: {error}"


def _measurement(
    measurement: Measurement, names: list[str], layers: int, path: str
) -> Iterator[str]:
    clips = [clip.name for clip in measurement.clips]
    yield from _repeated(clips, f"{path}.clips", ".name")
    yield from _figures(measurement.dense, clips, f"{path}.dense")
    for index, run in enumerate(measurement.schedules):
        at = f"{path}.schedules[{index}]"
        if run.schedule not in names:
            yield f"{at}.schedule is {shown(run.schedule)}, expected one of: {', '.join(names)}"
        yield from _figures(run, clips, at)
    yield from _repeated(
        (run.schedule for run in measurement.schedules), f"{path}.schedules", ".schedule"
    )
    for index, baseline in enumerate(measurement.baselines):
        at = f"{path}.baselines[{index}]"
        if baseline.against not in names:
            yield f"{at}.against is {shown(baseline.against)}, expected one of: {', '.join(names)}"
        yield from _operators(baseline.operators, at)
        if len(baseline.factors) != layers:
            yield f"{at}.factors is a list of {len(baseline.factors)}, expected {layers} layers"
        yield from _figures(baseline, clips, at)


def _figures(run: Run, clips: list[str], path: str) -> Iterator[str]:
    for index, figures in enumerate(run.figures):
        if figures.clip not in clips:
            expected = f"one of: {', '.join(clips)}" if clips else "a clip listed in clips"
            yield f"{path}.figures[{index}].clip is {shown(figures.clip)}, expected {expected}"


def _sensitivity(table: Sensitivity, layers: int, path: str) -> Iterator[str]:
    yield from _operators(table.operators, path)
    for field, rows in (("values", table.values), ("spreads", table.spreads)):
        if field == "spreads" and not rows:
            continue
        if len(rows) != layers:
            yield f"{path}.{field} is a list of {len(rows)}, expected {layers} layers"
        for index, row in enumerate(rows):
            if len(row) != len(table.factors):
                yield (
                    f"{path}.{field}[{index}] is a list of {len(row)}, expected one value for each "
                    f"of {len(table.factors)} factors"
                )
