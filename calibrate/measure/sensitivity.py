"""Profiling: the sensitivities that a search needs, stored on disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pandas as pd

from spark3r.layout import TokenLayout
from spark3r.reduction.rule import ResolvedRule, clamp

from ..defaults import (
    KEY_VALUE_FACTORS,
    OPERATORS,
    PAPER_POINT,
    PAPER_RAISE,
    PROBED_CLIPS,
    PROBED_KEY_VALUE_FACTORS,
    PROBED_QUERY_FACTORS,
    QUERY_FACTORS,
    SCALE_PROBE_FACTOR,
    TRUSTED,
    Source,
    probed_of,
)
from ..settings import Job
from .cache import cached_table, table_key
from .evaluator import DenseRuns
from .passes import drift_samples
from .probe import FAITHFULNESS, SensitivityError, probe, sensitive_layers
from .residual_drift import drift, fit_drift_to_probes, rank_agreement


def sensitivities(
    job: Job,
    dense: DenseRuns,
    *,
    query_factors: Sequence[int] = QUERY_FACTORS,
    key_value_factors: Sequence[int] = KEY_VALUE_FACTORS,
    trusted: float = TRUSTED,
) -> pd.DataFrame:
    """Return the sensitivities around the dense model.

    Every layer is probed at one factor per axis on the first clips. If drift on all the others
    ranks layers like these probes, it stands for the deviation at all factors, at a fraction of the
    cost. It is scaled by the ratio of the probes to drift on the probed clips. Otherwise more
    factors are probed. A single clip serves both.

    Args:
        job: The job.
        dense: Dense runs of the search clips.
        query_factors: Query factors at which drift is measured.
        key_value_factors: Key-value factors at which drift is measured.
        trusted: Least rank correlation of drift with the probes, on every axis.
    """
    few = dense.first(probed_of(len(dense.clips)))
    others = dense.part(len(few.clips)) if len(few.clips) < len(dense.clips) else few
    scale_probe = {
        "query_factors": (SCALE_PROBE_FACTOR,),
        "key_value_factors": (SCALE_PROBE_FACTOR,),
    }
    names = {"query_factors": query_factors, "key_value_factors": key_value_factors}
    total = len(others.clips) + len(few.clips)
    drifts = _drift(job, others, 0, total, **names)
    beside = _drift(job, few, len(others.clips), total, **scale_probe)
    job.reporter.progress("drift", total, total)
    probes = _probes(job, few, step="sensitivity", **scale_probe)
    agreement = rank_agreement(drifts, probes, FAITHFULNESS)
    text = ", ".join(f"{axis.replace('_', '-')} {value:.2f}" for axis, value in agreement.items())
    if len(agreement) == len(names) and all(each >= trusted for each in agreement.values()):
        job.reporter.say(
            f"drift ranks layers like probes do (Spearman: {text}) and stands in for them"
        )
        scaled = fit_drift_to_probes(drifts, probes, FAITHFULNESS, beside)
        probed = probes[probes["metric"] != FAITHFULNESS]
        return pd.concat([probed, scaled], ignore_index=True)
    job.reporter.say(
        f"drift does not rank layers like probes do (Spearman: {text or 'too few'}): all probed"
    )
    return _probes(
        job, few, PROBED_QUERY_FACTORS, PROBED_KEY_VALUE_FACTORS, "sensitivity, all factors"
    )


def _drift(
    job: Job, dense: DenseRuns, before: int, total: int, **factors: Sequence[int]
) -> pd.DataFrame:
    """Return the drift on clips that come after ``before`` of ``total`` clips."""

    def progress(done: int, _: int) -> None:
        job.reporter.progress("drift", before + done, total)

    key = table_key(job, dense.clips, OPERATORS, profiler="drift", **factors)
    return cached_table(
        job,
        key,
        lambda: drift(
            job.runner,
            dense.clips,
            OPERATORS,
            progress=progress,
            samples=drift_samples(dense),
            **factors,
        ),
    )


def _probes(
    job: Job,
    dense: DenseRuns,
    query_factors: Sequence[int],
    key_value_factors: Sequence[int],
    step: str,
) -> pd.DataFrame:
    """Return probes of all layers around the dense model.

    Each layer is stored as soon as it is measured, so that an interrupted run continues there.
    """
    factors = {"query_factors": query_factors, "key_value_factors": key_value_factors}
    key = table_key(job, dense.clips, OPERATORS, profiler="probe", point=(1, 1), **factors)

    def measure(layer: int) -> pd.DataFrame:
        return probe(
            job.runner,
            dense,
            OPERATORS,
            query_factors=query_factors,
            key_value_factors=key_value_factors,
            layers=(layer,),
            objective=job.settings.objective,
            progress=lambda done, total: job.reporter.progress(
                step, layer * total + done, job.depth * total
            ),
        )

    layers = range(job.depth)
    tables = [cached_table(job, {**key, "layer": each}, partial(measure, each)) for each in layers]
    return pd.concat(tables, ignore_index=True)


def paper_layers(job: Job, dense: DenseRuns, short: TokenLayout) -> tuple[int, ...]:
    """Return the sensitive layers by the paper's probe on the search clips.

    Its factors are brought down to what the shortest clip allows.
    """
    few = dense.first(PROBED_CLIPS)
    point = max(1, min(PAPER_POINT, short.frames // PAPER_RAISE))
    if clamp(ResolvedRule(1, PAPER_RAISE * point), short).key_value <= point:
        return ()  # clips of one or two frames have none to drop
    raised, operators = (PAPER_RAISE * point,), OPERATORS[:1]

    def measure() -> pd.DataFrame:
        return probe(
            job.runner,
            few,
            operators,
            key_value_factors=raised,
            operating_point=(1, point),
            objective=job.settings.objective,
            progress=job.reporter.step("paper's probe"),
        )

    key = table_key(
        job, few.clips, operators, profiler="probe", point=(1, point), key_value_factors=raised
    )
    return layers_by_paper(cached_table(job, key, measure), job.source)


def layers_by_paper(table: pd.DataFrame, source: Source) -> tuple[int, ...]:
    """Return the sensitive layers by the paper's rule on the table of its probe.

    Without ground truth there are no errors to go by, but consistency or deviation.
    """
    try:
        return sensitive_layers(table)
    except SensitivityError:
        own = "consistency.log_ratio" if source == "consistency" else "deviation.depth_log"
        return sensitive_layers(table, (own, "deviation.trajectory_step_deg"))
