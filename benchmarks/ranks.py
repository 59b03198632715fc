"""How much faster the quality part of a calibration is in several ranks, by CPU time.

    python benchmarks/ranks.py --output benchmarks/results/ranks.json

It calibrates the reference model under torchrun, one thread a rank, and adds up CPU time: of every
request to the ranks the one that takes longest, and what rank 0 does alone between the first pass
over clips and the end, latencies excepted. One process would need the sum over ranks instead of the
longest. The ratio is the speed-up where each rank has a core of its own, and the machine may be
busy; what it leaves out is the time of messages, which hold figures only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results_io import write_result

from calibrate.cli.main import main as calibrate_main
from calibrate.measure.passes import Passes
from calibrate.ranks import AloneTimer

LEAST = 1.7
"""Speed-up of two ranks that is demanded."""

WORDS = ("--budget", "2.5x", "--device", "cpu", "--output", "a.json", "--json")


def run_rank(folder: Path, words: Sequence[str]) -> int:
    """Calibrate as one rank, and write its CPU seconds."""
    requests: list[tuple[str, float]] = []
    timing_s, began_s = 0.0, 0.0
    work, time_in_turns = Passes.work, AloneTimer.time_in_turns

    def timed_work(passes: Passes, name: str, *arguments: Any) -> Any:
        nonlocal began_s, timing_s
        begin = time.process_time()
        if not requests:
            began_s, timing_s = begin, 0.0
        try:
            return work(passes, name, *arguments)
        finally:
            requests.append((name, time.process_time() - begin))

    def timed_timing(timer: AloneTimer, *arguments: Any, **options: Any) -> Any:
        nonlocal timing_s
        begin = time.process_time()
        try:
            return time_in_turns(timer, *arguments, **options)
        finally:
            timing_s += time.process_time() - begin

    Passes.work = timed_work  # type: ignore[method-assign,assignment]
    AloneTimer.time_in_turns = timed_timing  # type: ignore[method-assign,assignment]
    status = calibrate_main(words)
    whole_s = time.process_time() - began_s - timing_s
    figures = {"requests": requests, "alone_s": whole_s - sum(taken for _, taken in requests)}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(figures))
    return status


def summary(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the speed-up, and what it consists of."""
    requests = zip(*(each["requests"] for each in ranks), strict=True)
    together = [[taken for _, taken in request] for request in requests]
    alone_s = ranks[0]["alone_s"]
    shared_s, longest_s = sum(map(sum, together)), sum(map(max, together))
    return {
        "ranks": len(ranks),
        "requests": len(together),
        "passes_s": round(shared_s, 2),
        "longest_s": round(longest_s, 2),
        "alone_s": round(alone_s, 2),
        "speed_up": round((alone_s + shared_s) / (alone_s + longest_s), 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and return 1 if two ranks are slower than demanded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (default: 2)")
    parser.add_argument("--trials", default="24", help="trials of the search (default: 24)")
    parser.add_argument("--target-frames", default="128", help="target length (default: 128)")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file to write; by default it is printed")
    options = parser.parse_args(arguments)
    words = (*WORDS, "--trials", options.trials, "--target-frames", options.target_frames)
    if options.as_rank is not None:
        return run_rank(options.as_rank, words)
    with tempfile.TemporaryDirectory() as name:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        rank = [str(Path(__file__).resolve()), "--as-rank", name]
        rank += ["--trials", options.trials, "--target-frames", options.target_frames]
        command = [sys.executable, *launcher, str(options.ranks), *rank]
        paths = (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", ""))
        environment = os.environ | {
            "XDG_CACHE_HOME": name,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        subprocess.run(command, cwd=name, env=environment, check=True)
        files = [Path(name) / f"rank{rank}.json" for rank in range(options.ranks)]
        result = summary([json.loads(file.read_text()) for file in files])
    write_result(result, options.output)
    return 0 if options.ranks != 2 or result["speed_up"] >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
