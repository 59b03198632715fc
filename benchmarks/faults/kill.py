"""`calibrate` and `spark3r run`, killed at random moments and started again.

    python benchmarks/faults/kill.py --output benchmarks/results/faults_kill.json
    python benchmarks/faults/kill.py --share 0.02

Each job is a process of its own: a calibration of 4 clips with 6 trials and a made-up clock, and a
reconstruction, both of 48 frames. It gets SIGKILL at a moment drawn from the time that an
undisturbed job takes, and is then started again, the calibration with --resume. No finished trial
may be lost, no output half written, and the second job must end with the trials, scores, schedules
and files of an undisturbed one. ``--signal TERM`` sends SIGTERM instead, after which no lock and no
temporary file may be left, and the exit status must be 143.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from faults.jobs import (
    RESULTS,
    Job,
    again,
    disturb_jobs,
    half_written,
    job_parser,
    kept_trials,
    left_behind,
)

KILLS = 50
"""Kills of each command."""

TERMINATED = 143


def faults_after(job: Job, expected: Any) -> list[str]:
    """Start a killed job again, and return what is wrong."""
    folder, found = job.folder, RESULTS[job.command]
    wrong = [f"half written: {name}" for name in half_written(folder)]
    before = kept_trials(folder)
    if not (folder / "out").exists():  # after a kill that came late the result is there
        ended = again(job).run()
        if ended.status != 0:
            return [*wrong, f"the second job ended with {ended.status}: {ended.err[-300:]}"]
    after = kept_trials(folder)
    wrong += [f"lost: {each['study']} {each['name']}" for each in before if each not in after]
    if found(folder) != expected:
        wrong.append("the result is not that of an undisturbed job")
    return wrong


def kill(job: Job, kills: int, number: signal.Signals, chance: random.Random) -> dict[str, Any]:
    """Kill a job at random moments and return what came of it.

    Args:
        job: The job, in a folder that does not exist.
        kills: Number of processes to kill.
        number: The signal.
        chance: Source of the moments.
    """
    undisturbed = job.run()
    if undisturbed.status != 0:
        raise SystemExit(f"the job itself fails: {undisturbed.err}")
    expected, whole_s = RESULTS[job.command](job.folder), undisturbed.seconds
    killed, ended_before, wrong, left = 0, 0, [], 0
    while killed < kills:
        shutil.rmtree(job.folder)
        moment_s = chance.uniform(0, whole_s)
        begun = time.monotonic()
        ended = job.end(job.start(), begun, after_s=moment_s, number=number)
        if ended.status == 0:
            ended_before += 1
            continue
        killed += 1
        mistakes = []
        behind = left_behind(job.folder)
        left += bool(behind)
        if number == signal.SIGTERM:
            mistakes += [f"left behind: {name}" for name in behind]
            if ended.status != TERMINATED or "terminated: " not in ended.lines[-1]:
                mistakes.append(f"status {ended.status}: {ended.err[-300:]}")
        mistakes += faults_after(job, expected)
        if mistakes:
            wrong.append({"after_s": round(moment_s, 2), "faults": mistakes})
        print(f"{job.command}: {killed} of {kills}, {len(wrong)} wrong", file=sys.stderr)
    return {
        "kills": killed,
        "ended_before_the_kill": ended_before,
        "seconds_undisturbed": round(whole_s, 1),
        "left_locks_or_temporary_files": left,
        "faults": wrong,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill both commands and return 1 if anything was lost."""
    parser = job_parser(
        "`calibrate` and `spark3r run`, killed at random moments and started again.",
        f"{KILLS} kills each",
        seed="the moments",
    )
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL", help="the signal")
    options = parser.parse_args(arguments)
    number = signal.Signals[f"SIG{options.signal}"]
    kills = max(1, round(KILLS * options.share))
    chance = random.Random(options.seed)
    facts = {"signal": options.signal, "seed": options.seed}
    return disturb_jobs(
        options, lambda job: kill(job, kills, number, chance), facts, without="bench"
    )


if __name__ == "__main__":
    sys.exit(main())
