"""Small jobs of the commands in processes of their own, which the scripts of this folder disturb.

A job is forked from a process that has imported everything, so that it starts at once and its time
is that of its work. The model is small, and a made-up clock takes the latencies of ``calibrate``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib.pyplot  # noqa: F401  (a job would import it late)
import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import calibrate.cli.clips
import calibrate.pipeline
import calibrate.report.page
from calibrate.defaults import EFFORTS
from calibrate.search.storage import finished
from spark3r.cli.main import main as spark3r_main

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
import tiny_job

from faults.outcome import finish, outcome_parser

LIMIT_S = 300
"""Seconds after which a job is stopped and counts as a hang."""

FRAMES = 48
"""Frames of a job: those of the four clips of a calibration together, or of a reconstruction."""


def words_of(command: str, frames: int) -> tuple[str, ...]:
    """Return the words of a small job that reads some frames, a multiple of four."""
    if command == "calibrate":
        return (
            *("--budget", "75%", "--model", "tiny_job:make_tiny", "--frames", str(frames // 4)),
            *("--size", "16", "--target-frames", "64", "--trials", "6"),
            *("--output", "a.json", "--json", "--quiet"),
            *(word for seed in range(4) for word in ("--clip", f"rendered:{1_000_000 + seed}")),
        )
    if command == "run":
        return (
            *("run", "--model", "reference", "--clip", "rendered:7", "--frames", str(frames)),
            *("--profile", "reference", "--output", "out"),
        )
    return (
        *("bench", "--model", "reference", "--frames", str(frames // 6)),
        *("--schedules", "dense,wall", "--rounds", "1", "--output", "bench.json"),
    )


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        status: Exit status; minus the signal's number if a signal ended it.
        out: What it printed.
        err: What it said, without progress.
        seconds: How long it took.
    """

    status: int
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What it said, line by line."""
        return [line for line in self.err.splitlines() if line.strip()]


@dataclass(frozen=True)
class Job:
    """A command in its folder.

    Attributes:
        command: ``calibrate``, ``run`` or ``bench``.
        words: Options of ``calibrate``, or words of ``spark3r``.
        folder: Its working folder.
        cache: Folder of stored sensitivities; by default `folder` has one.
        log: Stem of the files beside the folder that hold what it prints; by default that of the
            folder.
    """

    command: str
    words: tuple[str, ...]
    folder: Path
    cache: Path | None = None
    log: str | None = None

    def start(self, prepare: Callable[[], object] = lambda: None) -> int:
        """Start the job and return its process id.

        Args:
            prepare: Function that the new process calls first, such as to limit its memory.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                status = self._work(prepare)
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)
        return pid

    def end(
        self,
        pid: int,
        begun: float,
        *,
        after_s: float | None = None,
        number: int = signal.SIGKILL,
    ) -> Ended:
        """Wait until a process ends.

        Args:
            pid: The process.
            begun: When it was started, by `time.monotonic`.
            after_s: Seconds after its start at which it gets the signal; None sends none.
            number: The signal, default SIGKILL.
        """
        sent = False
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            taken_s = time.monotonic() - begun
            if done:
                break
            if after_s is not None and not sent and taken_s >= after_s:
                os.kill(pid, number)
                sent = True
            if taken_s > LIMIT_S:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        out, err = (self._log(stream).read_text(errors="replace") for stream in ("out", "err"))
        return Ended(os.waitstatus_to_exitcode(status), out, err, taken_s)

    def run(self, prepare: Callable[[], object] = lambda: None) -> Ended:
        """Run the job to its end."""
        begun = time.monotonic()
        return self.end(self.start(prepare), begun)

    def _work(self, prepare: Callable[[], object]) -> int:
        for number, stream in ((1, "out"), (2, "err")):
            descriptor = os.open(self._log(stream), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
        os.chdir(self.folder)
        os.environ["XDG_CACHE_HOME"] = str(self.cache or self.folder / "cache")
        calibrate.cli.clips.EFFORTS = {  # type: ignore[attr-defined]
            name: each._replace(stretches=4) for name, each in EFFORTS.items()
        }
        for picture in ("sensitivity_picture", "schedules_picture", "trade_off_picture"):
            setattr(calibrate.report.page, picture, tiny_job.blank_picture)  # drawing is slow
        prepare()
        main = tiny_job.main if self.command == "calibrate" else spark3r_main
        status = main(list(self.words))
        if status == 0:
            self._log("peak").write_text(str(memory_bytes("VmPeak")))
        return status

    def peak_bytes(self) -> int:
        """Return the largest address space that the job had, if it ended well."""
        return int(self._log("peak").read_text())

    def _log(self, stream: str) -> Path:
        """Return the file of a stream, outside of the folder, which may be full."""
        return self.folder.parent / f"{self.log or self.folder.name}.{stream}"


def warm_up() -> None:
    """Prepare this process for its jobs. It computes nothing: threads do not survive a fork."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def limit(kind: int, most: int) -> None:
    """Limit a resource of this process, such as `resource.RLIMIT_AS`, to a number of bytes."""
    resource.setrlimit(kind, (most, most))


def memory_bytes(field: str) -> int:
    """Return a field of this process's memory, such as ``VmPeak``."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no field {field}")


def again(job: Job) -> Job:
    """Return the job that goes on where another was stopped."""
    resumed = (*job.words, "--resume") if job.command == "calibrate" else job.words
    return replace(job, words=resumed)


def trials(journal: Path) -> list[dict[str, Any]]:
    """Return the finished trials of all studies of a journal, without their times.

    A copy is read, so that Optuna leaves no lock beside the journal.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.journal"
        copy.write_bytes(whole_lines(journal.read_bytes()))
        storage = JournalStorage(JournalFileBackend(str(copy)))
        for name in sorted(optuna.get_all_study_names(storage)):
            for trial in finished(optuna.load_study(study_name=name, storage=storage)):
                kept = {key: trial.user_attrs.get(key) for key in ("name", "schedule", "score")}
                found.append({"study": name, "parameters": trial.params, **kept})
    return found


def kept_trials(folder: Path) -> list[dict[str, Any]]:
    """Return the finished trials of the calibration in a folder, none if it has no journal."""
    journal = folder / "a.journal"
    return trials(journal) if journal.exists() else []


def calibrated(folder: Path) -> dict[str, Any]:
    """Return what the calibration in a folder found: its trials, and its profile without times."""
    profile = json.loads((folder / "a.json").read_text())
    return {
        "trials": kept_trials(folder),
        "schedules": profile["schedules"],
        "default": profile["default"],
    }


def reconstructed(folder: Path) -> dict[str, Any]:
    """Return the files of the reconstruction in a folder, without those that hold its times."""
    return {
        str(path.relative_to(folder / "out")): path.read_bytes()
        for path in sorted((folder / "out").rglob("*"))
        if path.suffix in (".npy", ".txt")
    }


def benchmarked(folder: Path) -> dict[str, Any]:
    """Return what the benchmark in a folder measured, without times."""
    document = json.loads((folder / "bench.json").read_text())
    return {"schedules": [row["schedule"] for row in document["rows"]]}


RESULTS: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "calibrate": calibrated,
    "run": reconstructed,
    "bench": benchmarked,
}
"""The commands, and the functions from their folder to what must always be the same."""


def job_parser(description: str, share: str, *, seed: str = "") -> argparse.ArgumentParser:
    """Return a parser of the options that `disturb_jobs` reads; see `outcome_parser`."""
    parser = outcome_parser(description, share, seed=seed)
    parser.add_argument("--command", choices=RESULTS, help="disturb this command (default: all)")
    parser.add_argument(
        "--frames", type=int, default=FRAMES, help=f"frames of a job (default: {FRAMES})"
    )
    return parser


def disturb_jobs(
    options: argparse.Namespace,
    disturb: Callable[[Job], dict[str, Any]],
    facts: Mapping[str, Any] = MappingProxyType({}),
    *,
    without: str = "",
) -> int:
    """Disturb the jobs of the commands, write what happened and return the exit status.

    Args:
        options: What `job_parser` has read.
        disturb: Function from a job to what happened to it, with a list of ``faults``.
        facts: What the result begins with.
        without: A command that is left out.
    """
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            job.command: disturb(job)
            for job in jobs_of(options, Path(folder))
            if job.command != without
        }
    faults = [
        f"{command}: {fault}" for command, result in results.items() for fault in result["faults"]
    ]
    return finish({**facts, **results}, faults, options.output)


def jobs_of(options: argparse.Namespace, folder: Path) -> list[Job]:
    """Return the jobs to disturb, each in a folder of its own."""
    commands = [options.command] if options.command else list(RESULTS)
    return [Job(each, words_of(each, options.frames), folder / each) for each in commands]


def whole_lines(content: bytes) -> bytes:
    """Return the whole lines at the beginning of a journal."""
    whole = b""
    for line in content.splitlines(keepends=True):
        try:
            json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        whole += line
    return whole


def half_written(folder: Path) -> list[str]:
    """Return the files of a folder that are neither whole nor named as temporary ones."""
    wrong = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.is_dir():
            continue
        check = WHOLE.get(path.suffix)
        if check is not None and not check(path.read_bytes()):
            wrong.append(str(path.relative_to(folder)))
    return wrong


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _is_array(content: bytes) -> bool:
    size = int.from_bytes(content[8:10], "little")
    shape = content[10 : 10 + size].partition(b"'shape': (")[2].partition(b")")[0]
    values = 1
    for side in shape.split(b","):
        values *= int(side or 1)
    return len(content) == 10 + size + 4 * values


def _is_cloud(content: bytes) -> bool:
    header, _, rest = content.partition(b"end_header\n")
    count = int(header.partition(b"element vertex ")[2].split()[0])
    return len(rest) == 15 * count


WHOLE: Mapping[str, Callable[[bytes], bool]] = {
    ".json": _is_json,
    ".png": lambda content: content.endswith(b"IEND\xaeB`\x82"),
    ".html": lambda content: content.rstrip().endswith(b"</html>"),
    ".npy": _is_array,
    ".ply": _is_cloud,
    ".txt": lambda content: content.endswith(b"\n"),
}
"""Functions by suffix that tell whether a file is whole."""


def left_behind(folder: Path) -> list[str]:
    """Return locks and temporary files in a folder."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name.startswith(".") or path.suffix in (".busy", ".lock", ".tmp", ".partial")
    )
