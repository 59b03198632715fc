"""Commands that run out of memory in any stage.

    python benchmarks/faults/memory.py --output benchmarks/results/faults_memory.json
    python benchmarks/faults/memory.py --share 0.05

An undisturbed job tells how much address space it needs beyond that of its start. Others get a
share of that, from almost nothing to almost all, so that memory runs out while the model is loaded,
the clips are read, in a pass or while results are written. A job must end in one line that names
memory, or work all the same. No output may be half written, and what was finished must be kept: a
second job with enough memory has all trials of the first, and ends well.
"""

from __future__ import annotations

import re
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from faults.jobs import (
    Ended,
    Job,
    again,
    disturb_jobs,
    half_written,
    job_parser,
    kept_trials,
    left_behind,
    limit,
    memory_bytes,
)

LIMITS = 12
"""Limits for each command."""

NAMED = re.compile(r"(calibrate|spark3r): .*(out of|allocate) memory")


def starve(job: Job, limits: int) -> dict[str, Any]:
    """Run a job with several limits of its memory and return what came of it.

    Args:
        job: The job, in a folder that does not exist.
        limits: Number of limits.
    """
    ended = job.run()
    if ended.status != 0:
        raise SystemExit(f"the job itself fails: {ended.err}")
    start = memory_bytes("VmSize")
    needed = job.peak_bytes() - start
    outcomes: Counter[str] = Counter()
    wrong = []
    for number in range(limits):
        shutil.rmtree(job.folder)
        share = (number + 0.5) / limits
        ended = job.run(partial(limit, resource.RLIMIT_AS, start + int(share * needed)))
        mistakes = [f"half written: {name}" for name in half_written(job.folder)]
        mistakes += [f"left behind: {name}" for name in left_behind(job.folder)]
        outcome = outcome_of(ended)
        outcomes[outcome] += 1
        if outcome not in ("done", "named"):
            mistakes.append(f"{outcome}: {ended.err[-300:]}")
        before = kept_trials(job.folder)
        if ended.status != 0:
            ended = again(job).run()
            if ended.status != 0:
                mistakes.append(f"the second job ended with {ended.status}: {ended.err[-300:]}")
        after = kept_trials(job.folder)
        mistakes += [f"lost: {each['name']}" for each in before if each not in after]
        if mistakes:
            wrong.append({"share": round(share, 3), "faults": mistakes})
        print(f"{job.command}: {share:.0%} of the memory: {outcome}", file=sys.stderr)
    return {
        "needed_mb": round(needed / 1e6),
        "limits": limits,
        "outcomes": dict(sorted(outcomes.items())),
        "faults": wrong,
    }


def outcome_of(ended: Ended) -> str:
    """Return how a job ended, in a word."""
    if ended.status == 0:
        return "done"
    if ended.status < 0:
        return f"signal {-ended.status}"
    if "Traceback" in ended.err or not ended.lines or not NAMED.match(ended.lines[-1]):
        return f"status {ended.status}, not named"
    return "named"


def main(arguments: Sequence[str] | None = None) -> int:
    """Starve the commands and return 1 if anything was lost or not named."""
    parser = job_parser((__doc__ or "").splitlines()[0], f"{LIMITS} limits each")
    options = parser.parse_args(arguments)
    limits = max(1, round(LIMITS * options.share))
    return disturb_jobs(options, lambda job: starve(job, limits))


if __name__ == "__main__":
    sys.exit(main())
