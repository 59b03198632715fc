"""Rules between the fields of a profile, which a JSON Schema cannot state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..errors import ScheduleError
from .evidence import Measurement, Run, Sensitivity
from .messages import shown
from .model import ModelRecord, ScheduleRecord

if TYPE_CHECKING:
    from .document import Profile


def contradictions(profile: Profile) -> Iterator[str]:
    """Yield one line per contradiction between fields that are well-formed by themselves."""
    names = [record.name for record in profile.schedules]
    layers = len(profile.model.global_layers)
    yield from _repeated(profile.model.global_layers, "model.global_layers", "")
    yield from _repeated(names, "schedules", ".name")
    if profile.default not in names:
        yield f"default is {shown(profile.default)}, expected one of: {', '.join(names)}"
    for index, record in enumerate(profile.schedules):
        yield from _of_schedule(record, profile.model, f"schedules[{index}]")
    for index, measurement in enumerate(profile.measurements):
        yield from _of_measurement(measurement, names, layers, f"measurements[{index}]")
    for index, table in enumerate(profile.sensitivity):
        yield from _of_sensitivity(table, layers, f"sensitivity[{index}]")
    yield from _of_status(profile)


def _repeated(names: Iterable[str], path: str, key: str) -> Iterator[str]:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            yield f"{path}[{index}]{key} is {shown(name)} a second time, expected another name"
        seen.add(name)


def _of_schedule(record: ScheduleRecord, model: ModelRecord, path: str) -> Iterator[str]:
    modules = model.global_layers
    if len(record.layers) != len(modules):
        yield (
            f"{path}.layers is a list of {len(record.layers)}, expected one rule for each of the "
            f"model's {len(modules)} global layers"
        )
    for index, (layer, module) in enumerate(zip(record.layers, modules, strict=False)):
        if layer.index != index:
            yield f"{path}.layers[{index}].index is {layer.index}, expected {index}"
        if layer.module != module:
            yield (
                f"{path}.layers[{index}].module is {shown(layer.module)}, expected "
                f"{shown(module)} as in model.global_layers[{index}]"
            )
    try:
        record.length.length_rule()
    except ScheduleError as error:
        yield f"{path}.length: {error}"


def _of_measurement(
    measurement: Measurement, names: list[str], layers: int, path: str
) -> Iterator[str]:
    clips = [clip.name for clip in measurement.clips]
    yield from _repeated(clips, f"{path}.clips", ".name")
    yield from _of_figures(measurement.dense, clips, f"{path}.dense")
    for index, run in enumerate(measurement.schedules):
        at = f"{path}.schedules[{index}]"
        if run.schedule not in names:
            yield f"{at}.schedule is {shown(run.schedule)}, expected one of: {', '.join(names)}"
        yield from _of_figures(run, clips, at)
    yield from _repeated(
        (run.schedule for run in measurement.schedules), f"{path}.schedules", ".schedule"
    )
    for index, baseline in enumerate(measurement.baselines):
        at = f"{path}.baselines[{index}]"
        if baseline.against not in names:
            yield f"{at}.against is {shown(baseline.against)}, expected one of: {', '.join(names)}"
        if len(baseline.factors) != layers:
            yield f"{at}.factors is a list of {len(baseline.factors)}, expected {layers} layers"
        yield from _of_figures(baseline, clips, at)


def _of_figures(run: Run, clips: list[str], path: str) -> Iterator[str]:
    for index, figures in enumerate(run.figures):
        if figures.clip not in clips:
            expected = f"one of: {', '.join(clips)}" if clips else "a clip listed in clips"
            yield f"{path}.figures[{index}].clip is {shown(figures.clip)}, expected {expected}"


def _of_sensitivity(table: Sensitivity, layers: int, path: str) -> Iterator[str]:
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


def _of_status(profile: Profile) -> Iterator[str]:
    if profile.status == "measured":
        if profile.model.fingerprint is None:
            yield 'model.fingerprint is null, expected a fingerprint with status "measured"'
        measured = {run.schedule for entry in profile.measurements for run in entry.schedules}
        for index, record in enumerate(profile.schedules):
            if record.name not in measured:
                yield (
                    f"schedules[{index}] {shown(record.name)} is in no measurement, expected one "
                    'with status "measured"'
                )
        return
    if profile.measurements:
        yield (
            f"measurements is a list of {len(profile.measurements)}, expected none with status "
            f'"{profile.status}"'
        )
    if profile.source is None:
        yield f'source is null, expected a citation with status "{profile.status}"'
    if profile.status == "prior" and not profile.notes.strip():
        yield 'notes is empty, expected the rule that was followed, with status "prior"'
