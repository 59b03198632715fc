"""Drift stands in for probes only where it ranks layers like them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import tiny_job
import torch
from small_models import make_model
from tiny_job import Notes

import calibrate.measure.sensitivity
from calibrate.budget import parse_budget
from calibrate.clips import split_clips
from calibrate.defaults import ANCHOR_FACTOR, OPERATORS
from calibrate.measure.latency_model import TERMS, LatencyModel
from calibrate.measure.records import sensitivity_records, sensitivity_table
from calibrate.measure.sensitivity import dense_runs, paper_layers, sensitivities
from calibrate.progress import Reporter
from calibrate.search.candidates import choices
from calibrate.settings import Job, Settings
from spark3r.families.reference import FAMILY
from spark3r.runner import Runner


def job(said: Reporter, cache: Path | None = None) -> Job:
    settings = Settings(parse_budget("75%"), cache=cache)
    return Job(Runner.of(make_model(), FAMILY, torch.float32), settings, "error", said)


@pytest.fixture(scope="module")
def split():
    return split_clips(tiny_job.clips())


@pytest.mark.parametrize("trusted", [True, False])
def test_drift_is_trusted_where_it_ranks_like_probes(trusted: bool, split) -> None:
    said = Notes()
    work = job(said)
    least = -1.0 if trusted else 1.1  # rank correlations lie between -1 and 1
    table = sensitivities(work, dense_runs(work, split.search, "search"), trusted=least)
    by_metric = table.groupby("metric")["profiler"].unique()
    probed = set(table[table["metric"] == "score.error"]["factor"])
    if trusted:
        assert list(by_metric["score.deviation"]) == ["drift"]
        assert list(by_metric["score.error"]) == ["probe"]
        assert probed == {1, ANCHOR_FACTOR}
        assert "stands in for them" in said.lines[0]
    else:
        assert set(table["profiler"]) == {"probe"}
        assert probed > {1, ANCHOR_FACTOR}
        assert "all probed" in said.lines[0]
    layout = work.runner.layout(split.search[0].images)
    latency = LatencyModel(4, 10.0, dict.fromkeys(TERMS, 1.0))
    offered = choices(table, OPERATORS, latency, layout)
    factors = set(table[table["axis"] == "key_value"]["factor"])
    assert {choice.rule.key_value for choice in offered[0]} >= factors
    records = sensitivity_records(table, split)
    kept = table[table["metric"].str.startswith("score.")]
    keys = ["operators", "layer", "axis", "factor", "metric"]
    again = sensitivity_table(records).sort_values(keys).reset_index(drop=True)
    pd.testing.assert_frame_equal(
        again, kept.sort_values(keys).reset_index(drop=True), check_dtype=False
    )


def test_drift_is_measured_on_other_clips_than_the_probes_that_it_is_compared_with(
    split, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {"drift": set(), "beside": set(), "probe": set()}
    drift, probe = calibrate.measure.sensitivity.drift, calibrate.measure.sensitivity.probe

    def drifts(runner, clips, *args, **kwargs):
        at_all_factors = len(kwargs["query_factors"]) > 1
        seen["drift" if at_all_factors else "beside"] |= {clip.name for clip in clips}
        return drift(runner, clips, *args, **kwargs)

    def probes(runner, dense, *args, **kwargs):
        seen["probe"] |= {clip.name for clip in dense.clips}
        return probe(runner, dense, *args, **kwargs)

    monkeypatch.setattr(calibrate.measure.sensitivity, "drift", drifts)
    monkeypatch.setattr(calibrate.measure.sensitivity, "probe", probes)
    work = job(Reporter())
    table = sensitivities(work, dense_runs(work, split.search, "search"), trusted=-1.0)
    assert len(split.search) > 1
    assert seen["drift"]
    assert seen["probe"]
    assert not seen["drift"] & seen["probe"]
    assert seen["beside"] == seen["probe"]  # slopes are of the clips that were probed
    by_profiler: dict[str, set[str]] = {"drift": set(), "probe": set()}
    for record in sensitivity_records(table, split):
        by_profiler[record.profiler] |= set(record.clips)
    assert by_profiler == {name: seen[name] for name in by_profiler}


def test_an_interrupted_probe_goes_on_at_its_layer(
    split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = calibrate.measure.sensitivity.probe
    layers: list[tuple[int, ...]] = []

    def stopped(*args, **kwargs):
        layers.append(kwargs["layers"])
        if kwargs["layers"] == (1,) and layers.count((1,)) == 1:
            raise KeyboardInterrupt
        return probe(*args, **kwargs)

    monkeypatch.setattr(calibrate.measure.sensitivity, "probe", stopped)
    work = job(Reporter(), tmp_path)
    dense = dense_runs(work, split.search, "search")
    with pytest.raises(KeyboardInterrupt):
        sensitivities(work, dense, trusted=-1.0)
    sensitivities(work, dense, trusted=-1.0)
    assert layers == [(0,), (1,), (1,)]


def test_the_papers_probe_without_ground_truth_goes_by_what_there_is(
    split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deviation of depth, or where that is the source, consistency."""

    def probed(*args: object, **kwargs: object) -> pd.DataFrame:
        grown = {0: "consistency.log_ratio", 1: "deviation.depth_log"}
        rows = [
            {"layer": layer, "axis": "key_value", "factor": factor, "metric": metric}
            | {"mean": 2.0 if factor > 1 and grown.get(layer) == metric else 1.0}
            for layer in range(3)
            for factor in (1, 8)
            for metric in grown.values()
        ]
        return pd.DataFrame(rows)

    monkeypatch.setattr(calibrate.measure.sensitivity, "probe", probed)
    clip = replace(split.search[0], depth=None)
    work = job(Reporter())
    short = work.runner.layout(clip.images)
    dense = dense_runs(work, [clip], "search")
    for source, expected in (("deviation", (1,)), ("consistency", (0,))):
        assert paper_layers(replace(work, source=source), dense, short) == expected  # type: ignore[arg-type]
