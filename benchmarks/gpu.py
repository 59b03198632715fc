"""First figures from a GPU: every one is a line on the disk as soon as it is measured.

    python benchmarks/gpu.py --output DIR                       # all stages on one GPU
    python benchmarks/gpu.py --output DIR --stages env,sdpa     # some of them
    python benchmarks/gpu.py --output DIR --stages count        # beforehand; needs no GPU
    python benchmarks/gpu.py --output DIR --tiny                # everything in small, on a CPU

Stages run one after the other, the most informative first. Each is a process of its own with a
time limit of its own, so that an illegal memory access, a lack of memory or a kernel that hangs
ends this stage alone. `benchmarks/gpu_report.py` makes tables of the lines.

- ``env``: versions, chosen kernels, and the ceilings of products, copies and launches.
- ``sdpa``: attention at a pass's lengths by each kernel, with and without mass correction.
- ``ops``: single steps of a layer, and our kernels beside their plain twins.
- ``exact``: factors of 1, repeated passes, our kernels in a whole pass, places that wait.
- ``speed``: the paper's schedule, the wall and mass correction at 1,000 frames.
- ``dense``: dense beside them at 100, 300 and 500 frames, by kernel.
- ``long``: the length that is promised for a card of 24 GB, under its limit; 1,500 and 2,000.
- ``past``: compiled blocks, a half-precision head, queries merged through the block.
- ``count``: the memory that these passes should need, counted. It runs only if it is named.

The model's own code is found on the import path, or in the folders of ``--code``. Its weights are
random. The package of pydantic is not needed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from importlib import import_module
from pathlib import Path

from gpu_lines import Lines

STAGES: Mapping[str, tuple[str, float]] = {
    "env": ("gpu_kernels", 45),
    "sdpa": ("gpu_kernels", 75),
    "ops": ("gpu_kernels", 75),
    "exact": ("gpu_exact", 90),
    "speed": ("gpu_passes", 100),
    "dense": ("gpu_passes", 110),
    "long": ("gpu_passes", 75),
    "past": ("gpu_passes", 110),
    "count": ("gpu_passes", 1800),
}
"""Module and time limit in seconds of each stage."""

DEFAULT = tuple(name for name in STAGES if name != "count")

LEAST_S = 15.0
"""Seconds without which a stage is not begun, because importing torch alone takes several."""

FILE = "gpu.jsonl"


def run_stages(
    stages: Sequence[str],
    path: Path,
    limit_s: float,
    command: Callable[[str, float], list[str]],
    least_s: float = LEAST_S,
) -> bool:
    """Run stages one after the other, and write how each ended.

    Args:
        stages: Names of the stages.
        path: The file of the lines.
        limit_s: Seconds for all of them.
        command: Function from a stage and its seconds to the command that runs it.
        least_s: Seconds without which a stage is not begun.

    Returns:
        True if every stage ran to its end.
    """
    begin, complete = time.monotonic(), True
    for name in stages:
        left = limit_s - (time.monotonic() - begin)
        lines = Lines(path, name)
        if left < least_s:
            lines.put("end", status="not begun", seconds=0.0)
            complete = False
            continue
        seconds = min(STAGES[name][1], left)
        status = run_command(command(name, seconds), seconds)
        lines.put("end", status=status, seconds=round(time.monotonic() - lines.began, 1))
        complete = complete and status == "done"
    return complete


def run_command(command: Sequence[str], seconds: float) -> str:
    """Run a command for at most some seconds, and return how it ended."""
    # The compiler has processes of its own, which must end too.
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            _kill(process)
    return "done" if code == 0 else f"failed with code {code}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # it has ended, with everything that it started
        os.killpg(process.pid, signal.SIGKILL)


def parse_stages(text: str) -> tuple[str, ...]:
    """Return the stages of a list with commas."""
    names = tuple(dict.fromkeys(filter(None, text.split(","))))
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"'{text}', expected some of {','.join(STAGES)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help=f"folder for {FILE}")
    parser.add_argument(
        "--stages",
        type=parse_stages,
        default=DEFAULT,
        help=f"names with commas (default: {','.join(DEFAULT)})",
    )
    parser.add_argument(
        "--limit", type=float, default=560.0, help="seconds for all stages (default: 560)"
    )
    parser.add_argument(
        "--model", default="vggt:random", help="as for spark3r run (default: vggt:random)"
    )
    parser.add_argument(
        "--code", default="", help="folders with the model's code, separated like PATH"
    )
    parser.add_argument("--device", help="default: cuda, or cpu with --tiny or count alone")
    parser.add_argument(
        "--tiny", action="store_true", help="the same in small, with a model from the tests"
    )
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=1e9, help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_cpu = options.tiny or options.stages == ("count",)
    device = options.device or ("cpu" if on_cpu else "cuda")
    sys.path[:0] = [str(Path(__file__).parents[1])]
    sys.path += filter(None, options.code.split(os.pathsep))
    path = options.output / FILE
    if options.stage:
        lines = Lines(path, options.stage)
        try:
            from gpu_session import Session

            session = Session.make(lines, device, options.model, options.tiny, options.seconds)
            getattr(import_module(STAGES[options.stage][0]), options.stage)(session)
        except Exception as error:
            lines.failed("stage", error)
            raise
        return
    options.output.mkdir(parents=True, exist_ok=True)
    Lines(path, "run").put(
        "run",
        command="python " + " ".join(sys.argv),
        date=date.today().isoformat(),
        model=options.model,
        device=device,
        tiny=options.tiny,
    )

    def command(stage: str, seconds: float) -> list[str]:
        own = ["--stage", stage, "--seconds", str(seconds), "--device", device]
        return [sys.executable, "-u", __file__, *sys.argv[1:], *own]

    if not run_stages(options.stages, path, options.limit, command):
        sys.exit(1)


if __name__ == "__main__":
    main()
