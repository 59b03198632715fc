"""The scripts that interrupt and share a patched model find nothing, and would report a fault."""

from __future__ import annotations

import pytest
from benchmark_scripts import script

from spark3r.patching.passes import Passes
from spark3r.patching.patch import Patch


@pytest.mark.slow
def test_exceptions_at_steps_of_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = script(monkeypatch, "faults.exceptions")
    case = exceptions.CASES[0]
    rows = exceptions.run_all((case,), 0.01)
    assert len(rows) == len(exceptions.ACTIONS) * len(exceptions.ERRORS)
    assert all(row["raised"] > 0 for row in rows)
    assert [row for row in rows if row["faults"]] == []

    def forgetful(patch: Patch) -> None:
        while patch._undo:
            patch._undo.pop()()

    monkeypatch.setattr(Patch, "_take_off", forgetful)
    assert exceptions.sweep(exceptions.subject(case), "remove", RuntimeError, 0.1)["faults"]


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["", "end", "current"])
def test_threads_that_share_a_patched_model(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    threads = script(monkeypatch, "faults.threads")
    if broken == "end":
        monkeypatch.setattr(Passes, "end", lambda passes, output: None)
    elif broken:  # attention takes the pass that began last, of whatever thread
        begin = Passes.begin
        monkeypatch.setattr(
            Passes,
            "begin",
            lambda passes, batch, begun: (
                begin(passes, batch, begun),
                setattr(passes, "last", begun),
            ),
        )
        monkeypatch.setattr(Passes, "current", lambda passes, hidden: passes.last)
    (row,) = threads.run_all(threads.CASES[:1], 60, 7)
    assert sum(row["outcomes"].values()) == 60
    assert bool(row["wrong"]) == bool(broken)
    assert row["outcomes"]["right"] > (0 if broken else 40)
    assert row["outcomes"]["failed as asked"] > 0
