"""Threads that share one patched model: clips of mixed lengths, some of which fail.

    python benchmarks/faults/threads.py --output benchmarks/results/faults_threads.json
    python benchmarks/faults/threads.py --share 0.01

Every family's stand-in is called by four threads at once, with clips of many lengths, two patch
grids with as many tokens, and one or two clips in a batch. A tenth of the calls fail: in a module
that is drawn, or because what was given is no clip. Every output must be that of a call alone, to
the last bit, and every failure the one that was asked for. Two grids with as many tokens may be
refused while they run at the same time. At the end no pass may be left, and the model is restored.
"""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

import spark3r
from spark3r import LayoutError

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
from family_cases import ALL_CASES, Case, build, images, reducing, run

from faults.outcome import finish, outcome_parser

CASES = tuple(case for case in ALL_CASES if not case.needs)
CALLS = 10_000
THREADS = 4
FAILING = 0.1
FRAMES = range(1, 12)
GRIDS = ((1, 2), (2, 1))
KERNELS = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]


class InjectedError(Exception):
    """Raised in a module that was drawn."""


class Failures:
    """Raises an error in a module of a thread's pass."""

    def __init__(self) -> None:
        self._local = threading.local()

    def at(self, call: int) -> None:
        """Let this thread's call of a module fail, counted from 0; -1 for none."""
        self._local.left = call

    def count(self, module: nn.Module, inputs: object) -> None:
        """Count a call of a module (global pre-hook)."""
        left: int = getattr(self._local, "left", -1)
        self._local.left = left - 1
        if left == 0:
            raise InjectedError


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Return True if two outputs are equal to the last bit."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


class Callers:
    """Threads that call one model.

    Args:
        model: The patched model.
        clips: Clips by what was drawn for them.
        encodes_first: Whether the model encodes images before spark3r sees them, so that its own
            code refuses what is no clip.
    """

    def __init__(
        self, model: nn.Module, clips: dict[Any, Tensor], encodes_first: bool = False
    ) -> None:
        self.model, self.clips, self.encodes_first = model, clips, encodes_first
        self.expected: dict[Any, dict[str, Tensor]] = {}
        self.modules: dict[Any, int] = {}  # calls of modules, fewer where a layer is dense
        for key, clip in clips.items():
            seen: list[nn.Module] = []
            hook = register_module_forward_pre_hook(
                lambda module, _, seen=seen: seen.append(module)
            )
            self.expected[key] = run(model, clip)
            hook.remove()
            self.modules[key] = len(seen)
        self.failures = Failures()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    def call(self, chance: random.Random) -> str:
        """Make one call and return its outcome, which starts with ``wrong`` if it is that."""
        key = chance.choice(list(self.clips))
        clip, at = self.clips[key], -1
        asked = chance.choice(("module", "no clip")) if chance.random() < FAILING else ""
        if asked == "module":
            at = chance.randrange(self.modules[key])
        elif asked:
            clip = clip[..., :1, :1]
        self.failures.at(at)
        try:
            output = run(self.model, clip)
        except InjectedError:
            return "failed as asked" if asked == "module" else f"wrong: {key} failed"
        except LayoutError as error:
            if "is still running" in str(error):
                return "refused, as many tokens of another grid are running"
            small = "at least one frame and one patch" in str(error)
            return "failed as asked" if asked == "no clip" and small else f"wrong: {error}"
        except Exception as error:
            if self.encodes_first and asked == "no clip" and "Kernel size" in str(error):
                return "failed as asked"
            return f"wrong: {key} {type(error).__name__}: {error}"
        finally:
            self.failures.at(-1)
        if asked:
            return f"wrong: {key} did not fail"
        return "right" if same(output, self.expected[key]) else f"wrong: {key} has other outputs"

    def work(self, calls: int, seed: str) -> None:
        """Make calls in this thread."""
        chance = random.Random(seed)
        with torch.no_grad():
            for _ in range(calls):
                outcome = self.call(chance)
                with self._lock:
                    self.outcomes[outcome.partition(":")[0]] += 1
                    if outcome.startswith("wrong"):
                        self.wrong.append(outcome)


def run_case(case: Case, calls: int, seed: int) -> dict[str, Any]:
    """Return the outcomes of a family's calls."""
    model = deepcopy(build(case))
    clips = {
        (frames, batch, grid): images(case, frames, batch, *grid, seed=frames)
        for frames in FRAMES
        for batch in (1, 2)
        for grid in GRIDS
    }
    dense = {key: run(model, clip) for key, clip in clips.items()}
    handle = spark3r.apply(model, reducing(case.layers))
    callers = Callers(model, clips, encodes_first=case.family == "mapanything")
    hook = register_module_forward_pre_hook(callers.failures.count)
    shares = [calls // THREADS + (i < calls % THREADS) for i in range(THREADS)]
    threads = [
        threading.Thread(target=callers.work, args=(share, f"{seed}-{case.name}-{i}"))
        for i, share in enumerate(shares)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    if handle._passes._running:
        callers.wrong.append("wrong: a pass is left")
    handle.remove()
    if not all(same(run(model, clip), dense[key]) for key, clip in clips.items()):
        callers.wrong.append("wrong: the model is not restored")
    return {
        "model": case.name,
        "calls": calls,
        "outcomes": dict(sorted(callers.outcomes.items())),
        "wrong": callers.wrong,
    }


def run_all(cases: tuple[Case, ...], calls: int, seed: int) -> list[dict[str, Any]]:
    """Return one row per family, which has its part of the calls."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # threads change places in the middle of everything
    try:
        # π³'s own code chooses these kernels in every block, for the whole process. If one thread
        # leaves a block while another is inside, that one takes another kernel, which rounds
        # otherwise. So they are chosen before the threads start.
        with warnings.catch_warnings(), sdpa_kernel(KERNELS):
            warnings.simplefilter("ignore")
            return [run_case(case, -(-calls // len(cases)), seed) for case in cases]
    finally:
        sys.setswitchinterval(interval)


def main() -> int:
    """Make the calls and return 1 if one of them went wrong."""
    parser = outcome_parser((__doc__ or "").splitlines()[0], f"{CALLS} calls", seed="the calls")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = run_all(CASES, max(1, round(CALLS * options.share)), options.seed)
    wrong = [fault for row in rows for fault in row["wrong"]]
    total = {"calls": sum(row["calls"] for row in rows), "wrong": len(wrong)}
    return finish(total | {"threads": THREADS, "rows": rows}, wrong, options.output)


if __name__ == "__main__":
    sys.exit(main())
