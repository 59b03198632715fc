"""Export of the profile, with the evidence for it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence

import torch

from spark3r.clips import Clip
from spark3r.env import device_name, environment
from spark3r.identity import describe
from spark3r.kernels import choices_for
from spark3r.latency import FORM
from spark3r.profile import Profile
from spark3r.profile.evidence import (
    BaselineRun,
    ClipRecord,
    EnvironmentRecord,
    Figures,
    KernelRecord,
    LatencyModelRecord,
    Measurement,
    RefusedKernel,
    Role,
    Run,
    ScheduleRun,
    Sensitivity,
    Timing,
)
from spark3r.profile.model import OperatorsRecord
from spark3r.runner import dtype_name
from spark3r.schedule import LengthRule, Schedule
from spark3r.timing import Latency

from ..budget import ResolvedBudget
from ..clips import Split
from ..measure.measurements import LatencyTable
from ..measure.pace import Pace
from ..measure.quality import Quality
from ..settings import Job
from ..verify.held_out import Verification, Verified, VerifiedSchedule
from ..verify.selection import Decision
from .trade_off import TradeOff

BASELINES = ("uniform", "paper")


def make_profile(
    job: Job,
    split: Split,
    table: LatencyTable,
    budget: ResolvedBudget,
    pace: Pace,
    verification: Verification,
    decision: Decision | None,
    sensitivity: Sequence[Sensitivity],
    trade_off: TradeOff,
) -> Profile:
    """Return the profile of the chosen schedule, its rivals, and the trade-off.

    Without a decision, dense meets the budget and is the profile's only schedule. The latency model
    of ``table`` is the last corrected one.

    Raises:
        ProfileError: If the parts do not make a valid profile.
    """
    runner, family = job.runner, job.runner.family
    record = describe(
        family.name,
        runner.attention,
        family.metadata(runner.root),
        name=job.settings.name,
        weights=job.settings.weights,
    )
    dense = verification.dense
    budget_ms = budget.clip_ms
    schedules: dict[str, Schedule] = {}
    runs: list[ScheduleRun] = []
    baselines: list[BaselineRun] = []
    chosen = "dense" if decision is None else decision.chosen.kind
    if decision is None:
        frames = budget.frames
        schedules["dense"] = Schedule.uniform(
            job.depth, length=LengthRule("constant", frames, 1, frames)
        )
        runs.append(_schedule_run(dense, table.dense_ms, budget_ms))
    for each in sorted(verification.schedules, key=lambda each: each.name != chosen):
        if each.name in BASELINES and each.name != chosen:
            baselines.append(_baseline(each, chosen))
        elif each.schedule not in schedules.values():
            schedules[each.name] = each.schedule
            runs.append(_schedule_run(each, each.predicted_ms, budget_ms))
    for trial, qualities in trade_off.points:
        name = f"{table.dense_ms / trial.latency_ms:.2f}x"
        if trial.schedule not in schedules.values() and name not in schedules:
            schedules[name] = trial.schedule
            figures = figure_records(qualities)
            runs.append(
                ScheduleRun(
                    schedule=name, predicted_ms=trial.latency_ms, latency=None, figures=figures
                )
            )
    precision = runner.precision(split.held_out[0].images)
    measurement = Measurement(
        device=device_name(runner.device),
        dtype=dtype_name(precision),
        kernels=(
            KernelRecord(
                operation="attention",
                implementation=f"torch sdpa ({runner.device.type})",
            ),
            *kernel_records(runner.device, precision),
        ),
        frames=budget.frames,
        grid=(table.layout.height, table.layout.width),
        latency_model=LatencyModelRecord(
            form=FORM,
            constants=table.model.to_dict(),
            relative_error=table.largest_error,
        ),
        dense=Run(
            latency=None if dense.latency is None else _timing(dense.latency),
            figures=figure_records((*dense.qualities, *trade_off.dense)),
        ),
        wall=_timing(table.wall),
        schedules=tuple(runs),
        baselines=tuple(baselines),
        clips=() if decision is None else _clips(split),
        environment=_environment(job),
        seed=job.settings.seed,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )
    return Profile.create(
        record,
        schedules,
        status="measured",
        default=chosen,
        notes=_notes(job, split, table, budget, pace, decision, trade_off),
        measurements=(measurement,),
        sensitivity=sensitivity,
    )


def _environment(job: Job) -> EnvironmentRecord:
    """Return the environment that latencies were taken in."""
    record = environment()
    if job.threads is not None:
        record["threads"] = job.threads
    return EnvironmentRecord.model_validate_json(json.dumps(record))  # JSON has lists for tuples


def kernel_records(device: torch.device, dtype: torch.dtype) -> tuple[KernelRecord, ...]:
    """Return the implementations that passes on a device chose, where there was a choice."""
    return tuple(
        KernelRecord(
            operation=choice.operation,
            implementation=choice.implementation,
            refused=tuple(
                RefusedKernel(implementation=name, reason=reason) for name, reason in choice.refused
            ),
        )
        for choice in choices_for(device, dtype)
    )


def _schedule_run(each: Verified, predicted_ms: float, budget_ms: float) -> ScheduleRun:
    return ScheduleRun(
        schedule=each.name,
        predicted_ms=predicted_ms,
        latency=None if each.latency is None else _timing(each.latency),
        budget_ms=budget_ms,
        figures=figure_records(each.qualities),
    )


def _baseline(each: VerifiedSchedule, against: str) -> BaselineRun:
    return BaselineRun(
        baseline="uniform" if each.name == "uniform" else "paper",
        against=against,
        predicted_ms=each.predicted_ms,
        latency=None if each.latency is None else _timing(each.latency),
        operators=OperatorsRecord.of(each.schedule.operators),
        factors=tuple((rule.query, rule.key_value) for rule in each.schedule.layers),
        figures=figure_records(each.qualities),
    )


def _timing(latency: Latency) -> Timing:
    return Timing(median_ms=latency.median_ms, spread_ms=latency.spread_ms, n=latency.n)


def _clips(split: Split) -> tuple[ClipRecord, ...]:
    roles: tuple[tuple[Role, tuple[Clip, ...]], ...] = (
        ("search", split.search),
        ("validation", split.validation),
        ("held_out", split.held_out),
    )
    return tuple(
        ClipRecord(name=clip.name, digest=clip.digest(), frames=clip.frames, role=role)
        for role, clips in roles
        for clip in clips
    )


def _notes(
    job: Job,
    split: Split,
    table: LatencyTable,
    budget: ResolvedBudget,
    pace: Pace,
    decision: Decision | None,
    trade_off: TradeOff,
) -> str:
    lines = [
        f"made by calibrate {job.settings.goal_text} on {split.lengths}: {budget.text}. Latencies "
        f"hold at the pace at which {pace.text}."
    ]
    if all(clip.name.startswith("rendered:") for clip in split.clips):
        lines.append(
            "The evidence is of rendered rooms. Other footage can deviate more: `spark3r run "
            "--compare-dense` compares the two."
        )
    if not table.dense_fits:
        lines.append(
            "Dense does not fit at this length; the latency model extrapolates its latency."
        )
    elif table.dense is None:
        lines.append("Dense was not timed at this length; the latency model predicts its latency.")
    if decision is None:
        lines.append("Dense meets the budget, so nothing is reduced.")
    else:
        lines.append(f"Schedules were judged by {job.source}.")
        lines += [f"{reason}." for reason in decision.reasons]
    if split.skipped:
        lines.append(f"{len(split.skipped)} frames could not be read and were skipped.")
    if trade_off.points:
        lines.append(
            "Schedules named by their speed-up are other points of the search's trade-off. Their "
            "latency is predicted, and their figures are from validation clips."
        )
    return " ".join(lines)


def figure_records(qualities: Sequence[Quality]) -> tuple[Figures, ...]:
    """Return the quality of a run on each clip, in the form that a profile stores."""
    records = []
    for quality in qualities:
        sources: dict[str, dict[str, float]] = {}
        for name, value in quality.figures().items():
            source, _, metric = name.partition(".")
            sources.setdefault(source, {})[metric] = value
        records.append(
            Figures(
                clip=quality.clip,
                deviation=sources.get("deviation"),
                error=sources.get("error"),
                consistency=sources.get("consistency"),
            )
        )
    return tuple(records)
