"""Export: the profile of what was found, with the evidence for it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from torch import nn

from spark3r.env import device_name, environment
from spark3r.families import Family
from spark3r.fingerprint import describe
from spark3r.inference import device_of
from spark3r.profile import Profile
from spark3r.profile.evidence import (
    BaselineRun,
    ClipRecord,
    EnvironmentRecord,
    Figures,
    LatencyModel,
    Measurement,
    Run,
    ScheduleRun,
    Sensitivity,
    Timing,
)
from spark3r.profile.sections import OperatorsRecord
from spark3r.schedule import LengthRule, Operators, Schedule
from spark3r.timing import Latency

from .budget import ResolvedBudget
from .latency import FORM
from .latency_timing import LatencyTable
from .objective import Source
from .quality import Quality
from .splits import Split
from .verify import Decision, Verified

BASELINES = ("uniform", "paper")
METRICS = ("score.error", "score.consistency", "score.deviation")
"""Metrics of the sensitivities that a profile keeps."""


@dataclass(frozen=True)
class Evidence:
    """What all parts of a profile's evidence have in common.

    Attributes:
        model: The model, unpatched.
        family: What is known of it.
        table: Its latency at the target length.
        budget: The budget there.
        split: Clips by role.
        seed: Of everything random.
        source: What schedules were judged by.
        name: What people call the model.
        weights: Where its weights are found.
    """

    model: nn.Module
    family: Family
    table: LatencyTable
    budget: ResolvedBudget
    split: Split
    seed: int
    source: Source
    name: str | None
    weights: str | None


def make_profile(
    evidence: Evidence,
    verified: Sequence[Verified],
    decision: Decision | None,
    sensitivity: pd.DataFrame | None,
) -> Profile:
    """Return the profile of the chosen schedule and its rivals.

    Args:
        evidence: What was measured on.
        verified: What was measured, dense and the wall first.
        decision: Which schedule is the default; None where dense met the budget.
        sensitivity: The sensitivities, None likewise.

    Raises:
        ProfileError: If the parts make no valid profile.
    """
    attention = evidence.family.attention(evidence.model)
    record = describe(
        evidence.family.name,
        attention,
        evidence.family.facts(evidence.model),
        name=evidence.name,
        weights=evidence.weights,
    )
    dense, wall, *finalists = verified
    schedules: dict[str, Schedule] = {}
    runs: list[ScheduleRun] = []
    baselines: list[BaselineRun] = []
    chosen = "dense" if decision is None else decision.chosen.kind
    if decision is None:
        frames = evidence.budget.frames
        schedules["dense"] = Schedule.uniform(
            len(attention), length=LengthRule("constant", frames, 1, frames)
        )
        runs.append(_schedule_run(dense, "dense", evidence))
    for each in sorted(finalists, key=lambda each: each.name != chosen):
        assert each.schedule is not None
        if each.name in BASELINES and each.name != chosen:
            baselines.append(_baseline(each, chosen))
        elif each.schedule not in schedules.values():
            schedules[each.name] = each.schedule
            runs.append(_schedule_run(each, each.name, evidence))
    measurement = Measurement(
        device=device_name(device_of(evidence.model)),
        dtype=_dtype(evidence.model),
        attention_backend=f"torch sdpa ({device_of(evidence.model).type})",
        frames=evidence.budget.frames,
        grid=(evidence.table.layout.height, evidence.table.layout.width),
        latency_model=LatencyModel(
            form=FORM,
            constants=evidence.table.model.to_dict(),
            relative_error=evidence.table.report.largest_error,
        ),
        dense=Run(
            latency=_timing(dense.latency, evidence.table.dense_ms),
            figures=_figures(dense.qualities),
        ),
        wall=_timing(wall.latency, evidence.table.wall_ms),
        schedules=tuple(runs),
        baselines=tuple(baselines),
        clips=_clips(evidence.split, used=decision is not None),
        # By way of JSON, where a list is as good as a tuple.
        environment=EnvironmentRecord.model_validate_json(json.dumps(environment())),
        seed=evidence.seed,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )
    tables = () if sensitivity is None else sensitivity_records(sensitivity, evidence.split)
    return Profile.create(
        record,
        schedules,
        status="measured",
        default=chosen,
        notes=_notes(evidence, decision),
        measurements=(measurement,),
        sensitivity=tables,
    )


def sensitivity_records(table: pd.DataFrame, split: Split) -> tuple[Sensitivity, ...]:
    """Return the sensitivities as a profile keeps them.

    Args:
        table: From `calibrate.sensitivity.probe` around dense.
        split: Clips by role; the first of the search were probed.
    """
    records = []
    layers = int(table["layer"].max()) + 1
    kept = table[table["metric"].isin(METRICS)]
    for (operators, axis, metric), rows in kept.groupby(["operators", "axis", "metric"], sort=True):
        factors = sorted({int(factor) for factor in rows["factor"]})
        values = {
            (int(layer), int(factor)): float(mean)
            for layer, factor, mean in zip(rows["layer"], rows["factor"], rows["mean"], strict=True)
        }
        clips = split.search[: int(rows["clips"].max())]
        records.append(
            Sensitivity(
                axis="query" if axis == "query" else "key_value",
                profiler="probe",
                metric=str(metric),
                clips=tuple(clip.name for clip in clips),
                frames=min(clip.frames for clip in clips),
                operators=OperatorsRecord.of(Operators(**json.loads(str(operators)))),
                operating_point=(1, 1),
                factors=tuple(factors),
                values=tuple(
                    tuple(values.get((layer, factor)) for factor in factors)
                    for layer in range(layers)
                ),
            )
        )
    return tuple(records)


def _schedule_run(each: Verified, name: str, evidence: Evidence) -> ScheduleRun:
    predicted = evidence.table.dense_ms if each.predicted_ms is None else each.predicted_ms
    return ScheduleRun(
        schedule=name,
        predicted_ms=predicted,
        latency=_timing(each.latency, predicted),
        budget_ms=evidence.budget.clip_ms,
        figures=_figures(each.qualities),
    )


def _baseline(each: Verified, against: str) -> BaselineRun:
    assert each.schedule is not None
    assert each.predicted_ms is not None
    return BaselineRun(
        baseline="uniform" if each.name == "uniform" else "paper",
        against=against,
        predicted_ms=each.predicted_ms,
        latency=_timing(each.latency, each.predicted_ms),
        operators=OperatorsRecord.of(each.schedule.operators),
        factors=tuple((rule.query, rule.key_value) for rule in each.schedule.layers),
        figures=_figures(each.qualities),
    )


def _timing(latency: Latency | None, otherwise_ms: float) -> Timing:
    if latency is None:
        return Timing(median_ms=otherwise_ms, spread_ms=0.0, n=1)
    return Timing(median_ms=latency.median_ms, spread_ms=latency.spread_ms, n=latency.n)


def _figures(qualities: Sequence[Quality]) -> tuple[Figures, ...]:
    records = []
    for quality in qualities:
        sources: dict[str, dict[str, float]] = {}
        for name, value in quality.figures().items():
            source, _, metric = name.partition(".")
            sources.setdefault(source, {})[metric] = value
        records.append(
            Figures(
                clip=quality.clip,
                deviation=_or_none(sources, "deviation"),
                error=_or_none(sources, "error"),
                consistency=_or_none(sources, "consistency"),
            )
        )
    return tuple(records)


def _or_none(sources: Mapping[str, dict[str, float]], source: str) -> dict[str, float] | None:
    return sources.get(source) or None


def _clips(split: Split, *, used: bool) -> tuple[ClipRecord, ...]:
    if not used:
        return ()
    calibration = (*split.search, *split.selection)
    return tuple(
        ClipRecord(
            name=clip.name,
            digest=clip.digest(),
            frames=clip.frames,
            role="calibration" if number < len(calibration) else "held_out",
        )
        for number, clip in enumerate((*calibration, *split.held_out))
    )


def _dtype(model: nn.Module) -> str:
    parameter = next(iter(model.parameters()), None)
    return "float32" if parameter is None else str(parameter.dtype).removeprefix("torch.")


def _notes(evidence: Evidence, decision: Decision | None) -> str:
    lines = [f"made by calibrate --budget {evidence.budget.budget.text}: {evidence.budget.text}."]
    if evidence.table.dense_extrapolated:
        lines.append("Dense does not fit at this length; its latency is the latency model's word.")
    if decision is None:
        lines.append("Dense meets the budget, so nothing is reduced.")
    else:
        lines.append(f"Schedules were judged by {evidence.source}.")
        lines += [f"{reason}." for reason in decision.reasons]
    return " ".join(lines)
