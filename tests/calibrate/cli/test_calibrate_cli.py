from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_job
from optuna.storages.journal import JournalFileBackend
from tiny_job import JOB, FixedTimer, Notes, main

from spark3r import Profile
from spark3r.timing import Latency


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny_job.place(monkeypatch, tmp_path)


def test_done(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--budget", "75%", *JOB]) == 0
    out, err = capsys.readouterr()
    assert "(exported)" in out
    assert 'use it with spark3r.apply(model, "tiny-job-make-tiny-75pct.json")' in out
    assert "budget 75%: 1.17 ms/frame × 64 frames = 75.0 ms per clip, 1.33x dense speed" in err
    profile = Profile.load(tmp_path / "tiny-job-make-tiny-75pct.json")
    assert profile.model.name == "tiny_job:make_tiny"
    assert (tmp_path / "tiny-job-make-tiny-75pct.html").is_file()

    assert main(["--budget", "75%", *JOB]) == 1  # nothing is overwritten silently
    assert "exists already" in capsys.readouterr().err


def test_json_is_one_object_and_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--budget", "75%", *JOB, "--json", "--quiet", "--output", "a.json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert err == ""
    assert document["budget"]["clip_ms"] == 75
    assert document["holds"] is True
    assert {"dense", "wall", "uniform"} <= {row["schedule"] for row in document["schedules"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--budget"),
        (["--budget", "30"], "has no unit"),
        (["--budget", "75%", "--trials", "0"], "integer of at least 1"),
        (["--budget", "75%", "--clip", "rendered:x"], "expected rendered:SEED"),
        (["--budget", "75%", "--frames", "1"], "no pose to judge"),
        (["--budget", "75%", "--max-deviation", "1%"], "not allowed with"),
        (["--max-deviation", "1"], "expected a percentage"),
        (["--max-deviation", "1%", "--objective-from", "error"], "judges by deviation"),
        (["--budget", "75%", "--time-limit", "0s"], "above 0"),
        (["--budget", "75%", "--time-limit", "5"], "such as 90s, 5min or 1h"),
        (["--budget", "75%", "--effort", "quick", "--resume"], "--effort quick has none"),
        (["--budget", "75%", "--from", "a.json", "--dry-run"], "measures only the answer"),
        (["--budget", "75%", "--from", "a.json", "--resume"], "with --from there is none"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_unreachable_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--budget", "10x", *JOB, "--quiet"]) == 3
    err = capsys.readouterr().err
    assert "the least is" in err
    assert "Traceback" not in err
    assert not list(Path().glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "no/such/folder.json"], "there is no folder"),
        (["--output", "profile.txt"], "does not end in .json"),
        (["--model", "tiny_job:make_nothing"], "has no 'make_nothing'"),
        (["--model", "tiny_job:make_nan"], "layer 1 (aggregator.global_blocks.1.attn)"),
    ],
)
def test_failed(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--budget", "75%", *JOB, "--quiet", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_storage_that_cannot_be_opened_is_refused_before_clips_are_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/missing/study.db"
    assert main(["--budget", "75%", *JOB, "--storage", url]) == 1
    (line,) = capsys.readouterr().err.splitlines()  # no clip was read
    assert "missing/study.db: cannot be opened" in line


def test_read_only_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access("locked", os.W_OK):  # as for root, and for everybody on Windows
        monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    assert main(["--budget", "75%", *JOB, "--output", "locked/a.json"]) == 1
    assert "read-only" in capsys.readouterr().err


def test_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*names: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spark3r.profile.files.os.link", full)
    monkeypatch.setattr("spark3r.profile.files.os.replace", full)
    assert main(["--budget", "75%", *JOB, "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert "No space left on device" in err
    assert "(exported)" in out  # the measurements are shown all the same
    assert "wrote" not in out
    assert not list(Path().glob("*.json"))


def test_a_disk_that_fills_up_in_the_search_loses_no_finished_trial(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["--budget", "75%", *JOB, "--output", "a.json", "--json", "--quiet"]
    counts: list[int] = []
    append = JournalFileBackend.append_logs

    def filling(self: JournalFileBackend, logs: list) -> None:
        counts.append(len(logs))
        if len(counts) > 30:
            raise OSError(28, "No space left on device")
        append(self, logs)

    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", filling)
        assert main(job) == 1
    err = capsys.readouterr().err
    kept = int(re.search(r"stopped after (\d+) trials", err)[1])
    assert kept > 0
    assert "No space left on device" in err
    assert "Traceback" not in err

    notes = Notes()
    assert main([*job, "--resume"], reporter=notes) == 0
    tried = notes.steps.count("search") - 2  # it is reported before the first and after the last
    assert json.loads(capsys.readouterr().out)["trials"] == kept + tried


def test_figures_are_printed_even_if_the_report_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("calibrate.report.page.write_file", full)
        assert main(["--budget", "75%", *JOB, "--output", "a.json", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["report"] == []
    assert "the report could not be written" in err
    assert "No space left on device" in err
    assert Profile.load(tmp_path / "a.json").status == "measured"


def test_an_interrupted_report_leaves_the_profile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calibrate.report.page.write_report", stopped)
    assert main(["--budget", "75%", *JOB, "--output", "a.json", "--quiet"]) == 130
    assert "a.json is there, its report is not" in capsys.readouterr().err
    assert Profile.load(tmp_path / "a.json").status == "measured"


def test_a_profile_without_its_search_is_not_overwritten(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text("of another day")
    assert main(["--budget", "75%", *JOB, "--output", "a.json", "--resume"]) == 1
    assert "a.journal does not" in capsys.readouterr().err
    assert (tmp_path / "a.json").read_text() == "of another day"


def test_the_slower_of_two_processes_takes_another_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fsync = os.fsync

    def faster(descriptor: int) -> None:
        (tmp_path / "a.json").write_text("of another process")
        fsync(descriptor)

    monkeypatch.setattr("spark3r.profile.files.os.fsync", faster)
    assert main(["--budget", "75%", *JOB, "--output", "a.json", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["profile"].endswith("a-2.json")
    assert (tmp_path / "a.json").read_text() == "of another process"
    assert Profile.load(tmp_path / "a-2.json").status == "measured"
    assert (tmp_path / "a-2.html").is_file()


def test_a_second_process_at_the_same_search_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    program = (
        "import sys\n"
        "from calibrate.search.storage import lock_storage\n"
        f"with lock_storage({str(tmp_path / 'a.journal')!r}):\n"  # as the first process does
        "    print('searching', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"searching\n"
        assert main(["--budget", "75%", *JOB, "--output", "a.json"]) == 1
        first.communicate()
    assert "another process is searching there right now" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


@pytest.mark.slow
def test_clips_shorter_than_a_group_are_merged_as_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--budget", "60%", *JOB, "--json", "--quiet", "--output", "a.json"]) == 0
    assert json.loads(capsys.readouterr().out)["failed_trials"] == 0
    profile = Profile.load(tmp_path / "a.json")
    schedules = [profile.schedule(name) for name in profile.schedule_names()]
    merged = [
        each for each in schedules if any(rule.query > 1 for rule in each.resolve(tiny_job.TARGET))
    ]
    assert merged
    assert all(each.operators.query.group > tiny_job.FRAMES for each in merged)


def test_a_dense_latency_that_was_extrapolated_is_reported_as_such(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job, notes = ["--budget", "75%", *JOB, "--json", "--output", "a.json"], Notes()
    assert main(job, FixedTimer(dense_fits=False), reporter=notes) == 0
    assert json.loads(capsys.readouterr().out)["dense_fits"] is False
    assert any("dense does not fit at 64 frames" in line for line in notes.lines)
    assert "Dense does not fit at this length" in Profile.load(tmp_path / "a.json").notes
    assert "does not fit at 64 frames" in (tmp_path / "a.html").read_text()


@pytest.mark.slow
def test_a_budget_that_is_missed_has_a_status_of_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def restless(timed: dict[str, Latency], schedules: set[str]) -> dict[str, Latency]:
        slower = {name: Latency((2 * tiny_job.DENSE_MS,) * 2) for name in schedules}
        return timed | slower  # whatever is tried

    job = ["--budget", "75%", *JOB, "--json", "--output", "a.json"]
    assert main(job, FixedTimer(later=restless), reporter=Notes()) == 4
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["holds"] is False
    assert "200 ms per clip, and 75.0 ms are allowed" in document["missed"]
    assert err == f"calibrate: the goal is missed: {document['missed']}\n"
    assert Profile.load(tmp_path / "a.json").default == document["exported"]


@pytest.mark.slow
def test_a_trial_out_of_memory_is_counted_and_the_search_continues(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = ["--budget", "85%", *JOB, "--model", "tiny_job:make_hungry", "--trials", "4"]
    assert main([*job, "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert 0 < document["failed_trials"] < document["trials"]
    assert document["holds"] is True


@pytest.mark.slow
def test_the_fastest_schedule_within_a_deviation(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--max-deviation", "1%", *JOB, "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["judged_by"] == "deviation"
    assert document["score_by_clips"]["search"] <= 0.01
    assert document["score_by_clips"]["validation"] <= 0.01
    exported = next(row for row in document["schedules"] if row["exported"])
    assert exported["measured_ms"] < tiny_job.DENSE_MS
    profile = Profile.load(tmp_path / "tiny-job-make-tiny-within-1pct.json")
    assert "made by calibrate --max-deviation 1%" in profile.notes

    job = ["--max-deviation", "0.001%", *JOB, "--json", "--quiet"]
    assert main(job) == 0  # dense is always faithful enough
    exported = next(
        row for row in json.loads(capsys.readouterr().out)["schedules"] if row["exported"]
    )
    assert exported["measured_ms"] == pytest.approx(tiny_job.DENSE_MS)


@pytest.mark.parametrize("step", ["selection", "verification", "trade-off"])
def test_interrupted_after_the_search(
    step: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job = ["--budget", "75%", *JOB, "--output", "a.json", "--json"]
    assert main(job, reporter=Notes(interrupt_at=step)) == 130
    document = json.loads(capsys.readouterr().out)
    assert document["interrupted"] is True
    assert document["holds"] is True
    assert Profile.load(tmp_path / "a.json").default == document["exported"]
    selected = "interrupted before the selection" not in document["decision"][0]
    assert selected == (step != "selection")  # what was chosen by then is what is exported
    assert ("validation" in document["score_by_clips"]) == selected


def test_interrupted_search_exports_and_resumes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job = ["--budget", "75%", *JOB, "--output", "a.json", "--json"]
    assert main(job, reporter=Notes(interrupt_at="search", done=5)) == 130
    first = json.loads(capsys.readouterr().out)
    assert first["interrupted"] is True
    assert first["trials"] == 5
    assert Profile.load(tmp_path / "a.json").status == "measured"

    again = ["--budget", "75%", *JOB, "--output", "a.json", "--json", "--quiet", "--resume"]
    assert main(again) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["trials"] > 5
    assert second["interrupted"] is False


def test_interrupted_before_the_search(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--budget", "75%", *JOB], reporter=Notes(interrupt_at="dense, search")) == 130
    assert "interrupted: the search had not begun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class Preempted(Notes):
    """Gets SIGTERM, and another one right after, at a point of a step."""

    def progress(self, step: str, done: int, total: int) -> None:
        try:
            super().progress(step, done, total)
        except KeyboardInterrupt:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("step", "done", "left", "message"),
    [
        ("dense, search", 0, [], "the search had not begun"),
        ("search", 5, ["a.journal"], "finished trials are kept in a.journal; the same command"),
        ("verification", 0, ["a.journal"], "with --resume continues"),
    ],
)
def test_sigterm_stops_at_once_and_leaves_nothing_behind(
    step: str,
    done: int,
    left: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    job = ["--budget", "75%", *JOB, "--output", "a.json", "--json", "--quiet"]
    before = signal.getsignal(signal.SIGTERM)
    assert main(job, reporter=Preempted(step, done)) == 143
    assert signal.getsignal(signal.SIGTERM) == before
    out, err = capsys.readouterr()
    assert json.loads(out) == {"status": 143, "error": err.removeprefix("calibrate: ").strip()}
    assert err.startswith("calibrate: terminated: ")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == left

    assert main([*job, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["interrupted"] is False
    undisturbed = json.loads(tiny_job.profile_text())
    resumed = json.loads(Path("a.json").read_text())
    assert resumed["schedules"] == undisturbed["schedules"]
    assert resumed["default"] == undisturbed["default"]


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys\n"
        "from calibrate.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as left:\n    assert left.code == 0\n"
        "heavy = {'torch', 'optuna', 'pandas', 'scipy', 'matplotlib', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert answer.stdout.count("  calibrate --budget") == 3
    for default in ("(default: 24, with", "(default: 8)", "(default: cuda if", "(default: 0)"):
        assert default in answer.stdout
