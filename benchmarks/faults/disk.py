"""Commands that cannot write: full disk, quota, read-only folder, two writers.

    python benchmarks/faults/disk.py --output benchmarks/results/faults_disk.json
    python benchmarks/faults/disk.py --share 0.05

Each job works in a folder that is a disk of its own:

- ``full disk`` gives it a share of the space that an undisturbed job needs, so that every file that
  a command writes is the one that does not fit in some case.
- ``quota`` limits the size of each file by RLIMIT_FSIZE, as a share of the largest one.
- ``read-only`` mounts the disk read-only.
- ``no space for temporary files`` fills the disks of TMPDIR and of the cache, and not that of the
  output.
- ``two writers`` starts two jobs with the same output at once.

A job must end in a message that names a file and the reason, or work all the same. No output may be
half written, and once there is room, a second job must end with the result of an undisturbed one.
Disks are tmpfs, which takes root on Linux; without it, only the quota and the two writers are left.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from faults.jobs import (
    RESULTS,
    Ended,
    Job,
    again,
    disturb_jobs,
    half_written,
    job_parser,
    kept_trials,
    left_behind,
    limit,
)

SHARES = 6
"""Sizes of the full disk and of the quota for each command."""

PAGE, LARGE_BYTES = 4096, 64 * 2**20

REASONS = (
    *("No space left on device", "are free there", "File too large"),
    *("[Rr]ead-only", "exists already", "is searching there"),
)
NAMES = (
    *(r"a\.journal", r"a\.json", r"a-[\w-]+\.png", r"a\.html"),
    *(r"bench\.json", r"--output out\b", r"written in .*/run\b"),
)
NAMED = re.compile(rf"(calibrate|spark3r): .*({'|'.join(NAMES)}).*({'|'.join(REASONS)})")

Disturb = Callable[[], object]


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """Mount a disk of some bytes at a folder, and yield the function that changes its options."""
    folder.mkdir(parents=True, exist_ok=True)

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)

    mount(f"size={size}")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Return whether this process may mount disks."""
    if shutil.which("mount") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return False
    try:
        with disk(folder, LARGE_BYTES):
            return True
    except subprocess.CalledProcessError:
        return False


def faults_of(job: Job, ended: Ended, expected: Any, make_room: Disturb) -> tuple[str, list[str]]:
    """Return how a disturbed job ended, in a word, and what is wrong with it and the next one.

    Args:
        job: The job.
        ended: How it ended.
        expected: Result of an undisturbed job.
        make_room: Function that ends the disturbance.
    """
    outcome = outcome_of(ended)
    wrong = [f"half written: {name}" for name in half_written(job.folder)]
    wrong += [f"left behind: {name}" for name in left_behind(job.folder)]
    if outcome not in ("done", "named"):
        wrong.append(f"{outcome}: {ended.err[-300:]}")
    before = kept_trials(job.folder)
    make_room()
    if ended.status != 0:
        ended = again(job).run()
        if ended.status != 0:
            return outcome, [
                *wrong,
                f"the second job ended with {ended.status}: {ended.err[-300:]}",
            ]
    after = kept_trials(job.folder)
    wrong += [f"lost: {each['name']}" for each in before if each not in after]
    if RESULTS[job.command](job.folder) != expected:
        wrong.append("the result is not that of an undisturbed job")
    return outcome, wrong


def outcome_of(ended: Ended) -> str:
    """Return how a job ended, in a word."""
    if ended.status == 0:
        return "done"
    if ended.status < 0:
        return f"signal {-ended.status}"
    if "Traceback" in ended.err or not ended.lines or not NAMED.match(ended.lines[-1]):
        return f"status {ended.status}, not named"
    return "named"


def two_writers(job: Job, expected: Any) -> tuple[str, list[str]]:
    """Start a job twice at once, and return how both ended and what is wrong."""
    begun = time.monotonic()
    other = Job(job.command, job.words, job.folder, log=f"{job.folder.name}-second")
    first, second = job.start(), other.start()
    ended = [job.end(first, begun), other.end(second, begun)]
    outcomes = sorted(outcome_of(each) for each in ended)
    wrong = [f"half written: {name}" for name in half_written(job.folder)]
    wrong += [f"left behind: {name}" for name in left_behind(job.folder)]
    if "done" not in outcomes or not set(outcomes) <= {"done", "named"}:
        wrong.append(f"{outcomes}: {ended[0].err[-200:]} {ended[1].err[-200:]}")
    if not wrong and RESULTS[job.command](job.folder) != expected:
        wrong.append("the result is not that of an undisturbed job")
    return " and ".join(outcomes), wrong


def disturb(job: Job, shares: int, mounts: bool) -> dict[str, Any]:
    """Run a job under every fault and return what came of it.

    Args:
        job: The job, in a folder that does not exist.
        shares: Number of sizes of a full disk and of a quota.
        mounts: Whether disks can be mounted.
    """
    ended = job.run()
    if ended.status != 0:
        raise SystemExit(f"the job itself fails: {ended.err}")
    expected = RESULTS[job.command](job.folder)
    sizes = [path.stat().st_size for path in job.folder.rglob("*") if path.is_file()]
    needed = sum(-(-size // PAGE) * PAGE for size in sizes)
    shutil.rmtree(job.folder)
    outcomes: dict[str, Counter[str]] = {}
    wrong: list[dict[str, Any]] = []

    def note(fault: str, outcome: str, mistakes: list[str]) -> None:
        outcomes.setdefault(fault.partition(" (")[0], Counter())[outcome] += 1
        if mistakes:
            wrong.append({"fault": fault, "faults": mistakes})
        print(f"{job.command}, {fault}: {outcome}", file=sys.stderr)
        shutil.rmtree(job.folder, ignore_errors=True)

    for number in range(shares):
        share = (number + 0.5) / shares
        if mounts:
            most = int(share * needed) // PAGE * PAGE
            with disk(job.folder, most + PAGE) as remount:
                (job.folder / "full.bin").write_bytes(
                    b"x" * PAGE
                )  # a disk of no bytes has no limit
                room = partial(remount, f"size={LARGE_BYTES}")
                note(f"full disk ({most} bytes)", *faults_of(job, job.run(), expected, room))
        most = int(share * max(sizes))
        ended = job.run(partial(limit, resource.RLIMIT_FSIZE, most))
        note(f"quota ({most} bytes)", *faults_of(job, ended, expected, lambda: None))
    if mounts:
        with disk(job.folder, LARGE_BYTES) as remount:
            remount("ro")
            ended = job.run()
            note("read-only", *faults_of(job, ended, expected, partial(remount, "rw")))
        full = job.folder.parent / "full"
        with disk(full, PAGE):
            (full / "full.bin").write_bytes(b"x" * PAGE)
            crowded = Job(job.command, job.words, job.folder, cache=full)
            ended = crowded.run(partial(os.environ.__setitem__, "TMPDIR", str(full)))
            note("no space for temporary files", *faults_of(crowded, ended, expected, lambda: None))
    note("two writers", *two_writers(job, expected))
    return {
        "needed_bytes": needed,
        "outcomes": {fault: dict(sorted(counts.items())) for fault, counts in outcomes.items()},
        "faults": wrong,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Disturb the commands and return 1 if anything was lost, half written or not named."""
    parser = job_parser((__doc__ or "").splitlines()[0], f"{SHARES} sizes each")
    options = parser.parse_args(arguments)
    shares = max(1, round(SHARES * options.share))
    with tempfile.TemporaryDirectory() as folder:
        mounts = can_mount(Path(folder) / "disk")
    return disturb_jobs(options, lambda job: disturb(job, shares, mounts), {"mounts": mounts})


if __name__ == "__main__":
    sys.exit(main())
