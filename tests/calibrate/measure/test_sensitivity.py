"""Drift stands in for probes only where it ranks layers like them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import tiny_job
import torch
from small_models import make_model
from tiny_job import Notes

from calibrate.budget import parse_budget
from calibrate.clips import split_clips
from calibrate.defaults import OPERATORS, SCALE_PROBE_FACTOR
from calibrate.measure.evaluator import run_dense
from calibrate.measure.records import sensitivity_records, sensitivity_table
from calibrate.measure.sensitivity import layers_by_paper, sensitivities
from calibrate.progress import Reporter
from calibrate.search.candidates import choices
from calibrate.settings import Job, Settings
from spark3r.families.reference import FAMILY
from spark3r.latency import TERMS, LatencyModel
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
    table = sensitivities(work, run_dense(work.runner, split.search), trusted=least)
    by_metric = table.groupby("metric")["profiler"].unique()
    probed = set(table[table["metric"] == "score.error"]["factor"])
    if trusted:
        assert list(by_metric["score.deviation"]) == ["drift"]
        assert list(by_metric["score.error"]) == ["probe"]
        assert probed == {1, SCALE_PROBE_FACTOR}
        assert "stands in for them" in said.lines[0]
    else:
        assert set(table["profiler"]) == {"probe"}
        assert probed > {1, SCALE_PROBE_FACTOR}
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
    split, tmp_path: Path
) -> None:
    work = job(Reporter(), tmp_path)
    table = sensitivities(work, run_dense(work.runner, split.search), trusted=-1.0)
    seen: dict[str, set[str]] = {"drift": set(), "beside": set(), "probe": set()}
    for path in tmp_path.iterdir():
        key = json.loads(path.read_text())["key"]
        name = key["settings"]["profiler"]
        if name == "drift" and len(key["settings"]["query_factors"]) == 1:
            name = "beside"
        seen[name] |= {clip for clip, *_ in key["clips"]}
    assert len(split.search) > 1
    assert seen["drift"]
    assert seen["probe"]
    assert not seen["drift"] & seen["probe"]
    assert seen["beside"] == seen["probe"]  # slopes are of the clips that were probed
    by_profiler: dict[str, set[str]] = {"drift": set(), "probe": set()}
    for record in sensitivity_records(table, split):
        by_profiler[record.profiler] |= set(record.clips)
    assert by_profiler == {name: seen[name] for name in by_profiler}


def test_an_interrupted_probe_continues_at_its_layer(split, tmp_path: Path) -> None:
    class Probed(Reporter):
        def __init__(self, stop_at: int | None) -> None:
            self.stop_at, self.done = stop_at, []

        def progress(self, step: str, done: int, total: int) -> None:
            if step == "sensitivity":
                self.done.append(done)
                if done == self.stop_at:
                    raise KeyboardInterrupt

    whole, stopped, again = Probed(None), Probed(5), Probed(None)
    dense = run_dense(job(whole).runner, split.search)
    sensitivities(job(whole), dense, trusted=-1.0)
    assert whole.done == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]  # two layers of four runs
    with pytest.raises(KeyboardInterrupt):
        sensitivities(job(stopped, tmp_path), dense, trusted=-1.0)
    sensitivities(job(again, tmp_path), dense, trusted=-1.0)
    assert again.done == [4, 5, 6, 7, 8]


def test_the_papers_rule_without_ground_truth_goes_by_another_source() -> None:
    grown = {0: "consistency.log_ratio", 1: "deviation.depth_log"}
    rows = [
        {"layer": layer, "axis": "key_value", "factor": factor, "metric": metric}
        | {"mean": 2.0 if factor > 1 and grown.get(layer) == metric else 1.0}
        for layer in range(3)
        for factor in (1, 8)
        for metric in grown.values()
    ]
    assert layers_by_paper(pd.DataFrame(rows), "deviation") == (1,)
    assert layers_by_paper(pd.DataFrame(rows), "consistency") == (0,)
