"""The report of a calibration: pictures beside the profile, and a self-contained page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from spark3r.files import write_file
from spark3r.schedule import operators_text

from ..budget import number_text
from ..defaults import OPERATORS, SOURCES, Source
from ..measure.probe import FAITHFULNESS
from ..verify.held_out import VerifiedSchedule
from .figures import schedules_picture, sensitivity_picture, trade_off_picture
from .result import Calibration
from .summary import latency_text, missed, percent_text, rows, work_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_DPI = 130


def write_report(result: Calibration, output: Path) -> tuple[Path, ...]:
    """Write the pictures and the page beside a profile, and return their paths.

    If dense meets the budget there is nothing to draw, and nothing is written.

    Args:
        result: The calibration.
        output: File of the profile. Names of the other files begin with its stem.

    Raises:
        OSError: If a file cannot be written.
    """
    pictures = {name: _png(figure) for name, figure in draw(result).items()}
    if not pictures:
        return ()
    written = []
    for name, content in pictures.items():
        path = output.with_name(f"{output.stem}-{name}.png")
        write_file(path, content)
        written.append(path)
    page = output.with_suffix(".html")
    write_file(page, render(result, output.name, pictures))
    return (*written, page)


def draw(result: Calibration) -> dict[str, Figure]:
    """Return the pictures by name, none if dense meets the budget."""
    if result.sensitivities is None:
        return {}
    table = result.sensitivities.table
    names = {("query", operators_text(each)): each.query.describe() for each in OPERATORS}
    names |= {("key_value", operators_text(each)): each.key_value.describe() for each in OPERATORS}
    schedules = {each.name: each.schedule for each in result.verification.schedules}
    pictures = {
        "sensitivity": sensitivity_picture(table, _fullest(table, result.source), names),
        "schedules": schedules_picture(schedules, result.chosen.name),
    }
    if result.found is not None:
        pictures["trade-off"] = trade_off_picture(result, result.found)
    return pictures


def _fullest(table: pd.DataFrame, source: Source) -> str:
    """Return the score to draw: the source's, or deviation if that has more factors."""
    counts = table.groupby("metric")["factor"].nunique()
    own = f"score.{source}"
    return own if counts.get(own, 0) >= counts.get(FAITHFULNESS, 0) else FAITHFULNESS


def render(result: Calibration, profile: str, pictures: Mapping[str, bytes]) -> str:
    """Return the page as HTML, with the pictures in it.

    Args:
        result: The calibration.
        profile: Name of the profile's file.
        pictures: Contents of the PNG files by name.
    """
    environment = Environment(
        loader=PackageLoader("calibrate.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda mean, source: (
        "–" if mean is None else percent_text(mean, source)
    )
    environment.filters["sentence"] = lambda text: f"{text[:1].upper()}{text[1:]}."
    environment.filters["number"] = lambda value: "–" if value is None else number_text(value)
    table = rows(result)
    measurement = result.profile.measurements[0]
    return environment.get_template("report.html.jinja").render(
        profile=profile,
        model=result.profile.model,
        measurement=measurement,
        environment=measurement.environment.model_dump(),
        result=result,
        answer=_answer(result, table),
        missed=missed(result),
        sources=[name for name in SOURCES if any(name in row["scores"] for row in table)],
        rows=table,
        figures=list(dict.fromkeys(name for row in table for name in row["figures"])),
        latency_report=latency_text(result),
        work=work_text(result),
        drawn_by=None
        if result.sensitivities is None
        else _fullest(result.sensitivities.table, result.source).removeprefix("score."),
        layers=result.chosen.schedule.resolve(result.budget.frames)
        if isinstance(result.chosen, VerifiedSchedule)
        else (),
        pictures={name: base64.b64encode(png).decode("ascii") for name, png in pictures.items()},
    )


def _answer(result: Calibration, table: list[dict[str, Any]]) -> str | None:
    """Return in one sentence what the exported schedule gains and loses, and how sure that is."""
    exported = next((row for row in table if row["exported"]), None)
    if exported is None or exported["speed_up"] is None or result.source not in exported["scores"]:
        return None
    held_out = len(result.split.held_out)
    name = {"error": "Its error is", "consistency": "Its consistency error is"}.get(result.source)
    loss = percent_text(exported["scores"][result.source], result.source)
    changed = f"{name} {loss} % against dense" if name else f"It deviates {loss} % from dense"
    predicted = "is predicted to be" if result.latency.dense is None else "is"
    return (
        f"The schedule {predicted} {exported['speed_up']:.2f} times as fast as dense. {changed}, "
        f"which is the mean over {held_out} held-out clips with its 95 % interval."
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
