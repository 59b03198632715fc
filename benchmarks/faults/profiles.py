"""Malformed profiles: by the grammar of a document, and byte by byte.

    python benchmarks/faults/profiles.py --output benchmarks/results/faults_profiles.json
    python benchmarks/faults/profiles.py --share 0.01

Each case starts from a valid document. Some of its values are changed, removed, renamed, repeated
or swapped, and the document is written as JSON in some unusual way; or the bytes of the file are
flipped, cut, inserted or copied. A third of the cases are mild, so that many are accepted.

`Profile.load` must then refuse the file with a `ProfileError`, or accept it. A profile that is
accepted must be the same after it is saved and loaded, `spark3r show` must print it, and in a pass
of a model that its default schedule is applied to, each layer must equal the slow oracle of the
tests. Nothing else may be raised, no case may take more than three seconds, and the process must
not grow.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spark3r import Schedule, TokenLayout, apply, generic
from spark3r.cli.main import parser
from spark3r.errors import ProfileError, Spark3rError, Spark3rWarning
from spark3r.profile import Profile
from spark3r.reduction.rule import ResolvedRule

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
import oracle
from profile_documents import copied, measured, paper, reference_profile

from faults.outcome import finish, outcome_parser

ROOT = Path(__file__).parents[2]
CASES = 100_000
MOST_SECONDS = 3.0
"""CPU time that a case may take. Other work on the machine does not count. Where the model's code
is installed, counting the memory of a pass takes more than half a second of it."""
HANG_SECONDS = 20
"""Time on the clock after which a case is stopped. It covers waiting."""
MOST_GROWTH_MB = 200
MOST_SHOWN = 20
"""Faults that the result describes. All of them are counted."""

LAYOUTS = (
    TokenLayout(9, 3, 4, special=2, anchor_frame=0),
    TokenLayout(50, 1, 2, special=1, anchor_frame=0),
    TokenLayout(110, 1, 2),  # beyond 100 frames, where the paper's length rule begins
)
TOLERANCE = 1e-9

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 4, 7, 16, 48, 1.0, 0.5, -0.5, 1e308, 1e-308),
    *(2**31, 2**53, 2**63, 2**64, 10**30, 10**400, float("nan"), float("inf"), -float("inf")),
    *("", "x", "copy", "linear", "token_stride", "temporal_stride", "intra_group", "paper"),
    *("constant", "constant_kept_frames", "measured", "prior", "2026-02-30", "\x00", "\x1b[2J"),
    *("../../etc/passwd", "/dev/zero", "\ud800", "é" * 40, "x" * 10_000, "__class__", "{0}", "%s"),
    *([], [[]], [None], [1, 4], {}, {"": 0}, {"name": "x"}, {"name": ["token_stride"]}),
)
"""Values that take the place of others."""


def bases() -> list[Any]:
    """Return valid documents: of each status and version, by hand and as shipped."""
    stored = [ROOT / "profiles" / f"{name}.json" for name in ("vggt-1b", "da3-large", "pi3x")]
    stored.append(ROOT / "tests" / "spark3r" / "profile" / "version1" / "small.json")
    return [paper(), measured(), reference_profile(), *(json.loads(p.read_text()) for p in stored)]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key or index) of a document."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


MILD: dict[str, tuple[Any, ...]] = {
    "name": ("token_stride", "temporal_stride", "intra_group"),
    "mode": ("constant", "constant_kept_frames", "paper"),
    "unmerge": ("copy", "linear"),
    "mass_correction": (0, 0.25, 1, 1.0),
}
"""Values that a field may well have, by its name."""


def varied(document: Any, chance: random.Random) -> Any:
    """Return a copy of a document with other factors, operators and lengths."""
    document = copied(document)
    found = list(places(document["schedules"]))
    for container, key in chance.sample(found, min(len(found), chance.randint(1, 12))):
        value = container[key]
        if isinstance(value, bool):
            container[key] = not value
        elif key in MILD and (key != "name" or "keep_anchor" in container):
            container[key] = chance.choice(MILD[key])
        elif isinstance(value, int) and key not in ("index", "call"):
            container[key] = chance.choice((1, 2, 3, 5, 9, 64, 10**9, 2**64, value + 1))
    return document


def changed(document: Any, chance: random.Random) -> Any:
    """Return a copy of a document with one to four changes."""
    document = copied(document)
    for _ in range(chance.randint(1, 4)):
        found = list(places(document))
        if not found:
            return document
        container, key = chance.choice(found)
        other, place = chance.choice(found)
        match chance.randrange(9):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[str(key) + chance.choice(("s", "", " ", "\x00"))] = container.pop(key)
            case 2 if isinstance(container, list):
                container.extend(copied(container) * chance.choice((1, 1, 1, 50)))
            case 3 if isinstance(container, list):
                chance.shuffle(container)
            case 4:
                container[key] = copied(other[place])
            case 5 if isinstance(container[key], int | float):
                container[key] = chance.choice((1, 2, 3, 5, 8, 13, 64, container[key] * 2))
            case 6 if isinstance(container[key], bool):
                container[key] = not container[key]
            case _:
                container[key] = deepcopy(chance.choice(JUNK))
    return document


def written(document: Any, chance: random.Random) -> bytes:
    """Return a document as JSON, now and then of an unusual form."""
    text = json.dumps(document, ensure_ascii=chance.random() < 0.5, indent=chance.choice((None, 1)))
    match chance.randrange(14):
        case 0:
            text = text.replace("}", ",}", 1)
        case 1:
            key = chance.choice(("query", "default", "name", "version", "status"))
            text = text.replace(f'"{key}":', f'"{key}": 1, "{key}":', 1)
        case 2:
            deep = chance.choice((5, 30, 900, 5000, 100_000))
            text = text.replace("{", '{"x": ' + "[" * deep + "]" * deep + ",", 1)
        case 3:
            text = text.replace("1", "1" * chance.choice((1, 20, 400, 5000)), 1)
        case 4:
            text = "\ufeff" + text
        case 5:
            text = text.replace('"', "'", chance.choice((1, 2, 10_000)))
        case 6:
            text = text.replace("a", "\\u0061").replace(": ", " :\t")
        case 7:
            text += chance.choice(("\n", "\x00", "{}", "//", "]"))
    return text.encode(chance.choice(("utf-8",) * 20 + ("utf-16", "utf-8-sig")), "surrogatepass")


def damaged(raw: bytes, chance: random.Random) -> bytes:
    """Return the bytes of a file with one to eight of them, or a part, wrong."""
    data = bytearray(raw)
    digits = [place for place, byte in enumerate(data) if 48 <= byte < 58]
    if chance.random() < 0.33:
        for place in chance.sample(digits, chance.randint(1, 2)):
            data[place] = chance.randrange(48, 58)
        return bytes(data)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at:at] = bytes([chance.randrange(256)])
            case 2:
                del data[at : at + chance.choice((1, 2, 50))]
            case 3 if chance.random() < 0.2:
                del data[at:]
            case 4:
                start = chance.randrange(len(data) + 1)
                data[at:at] = data[start : start + chance.choice((1, 8, 200))]
            case _:
                data[at : at + 1] = chance.choice(b'0123456789"{}[],:-.eE \\').to_bytes(1, "big")
    return bytes(data)


def split(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and values ``[1, 2, N, 4]`` that tokens ``[1, N, 24]`` hold."""
    query, key, value = tokens.unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    return query, key, value


@lru_cache(maxsize=len(LAYOUTS))
def inputs(layout: TokenLayout) -> Tensor:
    """Return tokens ``[1, N, 24]`` in float64, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, layout.tokens, 24, dtype=torch.float64, generator=generator)


@lru_cache(maxsize=2048)
def expected(layout: TokenLayout, rule: ResolvedRule) -> Tensor:
    """Return the oracle's output of a layer."""
    return oracle.attend(*split(inputs(layout)), layout, rule)


class Attention(nn.Module):
    """A global layer without projections."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return attention ``[1, 2, N, 4]``."""
        return nn.functional.scaled_dot_product_attention(*split(tokens))


class Layers(nn.Module):
    """Global layers that all get the same tokens."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.attn = nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Return the output of each layer."""
        return [layer(tokens) for layer in self.attn]


@lru_cache(maxsize=32)
def model_of(layers: int) -> Layers:
    return Layers(layers)


def reduced(schedule: Schedule, layout: TokenLayout) -> list[Tensor]:
    """Return the output of each layer of a model that a schedule is applied to."""
    model = model_of(len(schedule.layers))
    family = generic("attn.*", layout=lambda *_: (1, layout))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Spark3rWarning)  # of a clip beyond max_frames
        with apply(model, schedule, family=family):
            outputs: list[Tensor] = model(inputs(layout))
    return outputs


def outcome(path: Path, again: Path, layout: TokenLayout) -> str:
    """Load a profile and return ``refused`` or ``accepted``, or what is wrong."""
    try:
        profile = Profile.load(path)
    except ProfileError as error:
        message = str(error)
        if not message.startswith(f"{path}: "):
            return "fault: the message does not name the file"
        return "refused" if len(message) < 20_000 else "fault: nobody reads so long a message"
    again.unlink(missing_ok=True)
    profile.save(again)
    if Profile.load(again) != profile:
        return "fault: saving changed the profile"
    if problem := show(path, layout):
        return f"fault: {problem}"
    schedule = profile.schedule()
    rules = schedule.resolve_within(layout)
    for rule, output in zip(rules, reduced(schedule, layout), strict=True):
        difference = float((output - expected(layout, rule)).abs().max())
        if not difference <= TOLERANCE:
            return f"fault: a layer is {difference:.1e} off the oracle"
    return "accepted"


@lru_cache(maxsize=1)
def command_line() -> argparse.ArgumentParser:
    return parser()


def show(path: Path, layout: TokenLayout) -> str:
    """Print a profile as ``spark3r show`` does, and return what is wrong with it, "" if nothing."""
    arguments = ["show", str(path)]
    if layout is LAYOUTS[0]:  # time and memory of a length are slow, so in a third of the cases
        arguments += ["--frames", str(layout.frames)]
    options = command_line().parse_args(arguments + ["--json"] * (path.stat().st_size % 2))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(Spark3rError):
        options.run(options)
    steers = not all(each.isprintable() or each == "\n" for each in printed.getvalue())
    return "show steers the terminal" if steers else ""


def guarded(call: Callable[[], str]) -> tuple[str, float]:
    """Return a call's outcome, or what went wrong, and its CPU seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_SECONDS)
    started = time.process_time()
    try:
        result = call()
    except TimeoutError:
        result = f"fault: no end after {HANG_SECONDS} s"
    except Exception as error:  # anything at all is a fault to report
        result = f"fault: {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    return result, time.process_time() - started


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(cases: int, seed: int, folder: Path) -> dict[str, Any]:
    """Return counts of outcomes, the slowest case, the growth of the process, and the faults."""
    documents = bases()
    large = json.loads((ROOT / "profiles" / "reference.json").read_text())
    path, again = folder / "case.json", folder / "again.json"
    counts: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    slowest, warm_mb, compared = 0.0, 0.0, 0
    for number in range(cases):
        chance = random.Random(f"{seed}-{number}")
        document = large if chance.random() < 0.02 else chance.choice(documents)
        kind = "grammar" if number % 2 == 0 else "bytes"
        if kind == "grammar":
            change = varied if chance.random() < 0.33 else changed
            raw = written(change(document, chance), chance)
        else:
            raw = damaged(json.dumps(document).encode(), chance)
        path.write_bytes(raw)
        layout = chance.choice(LAYOUTS)
        known = expected.cache_info().misses
        result, seconds = guarded(partial(outcome, path, again, layout))
        oracle_ran = expected.cache_info().misses > known
        compared += oracle_ran
        if not oracle_ran:  # the oracle is slow on purpose
            slowest = max(slowest, seconds)
            if seconds > MOST_SECONDS and not result.startswith("fault"):
                result = f"fault: {seconds:.1f} s"
        counts[f"{kind}, {result.partition(':')[0]}"] += 1
        if result.startswith("fault") and len(faults) < MOST_SHOWN:
            faults.append({"case": number, "kind": kind, "fault": result, "start": repr(raw[:80])})
        if number == cases // 10:
            warm_mb = peak_mb()
    return {
        "cases": cases,
        "seed": seed,
        "outcomes": dict(sorted(counts.items())),
        "passes_with_a_new_rule": compared,
        "slowest_case_cpu_s": round(slowest, 3),
        "growth_mb": round(peak_mb() - warm_mb, 1),
        "faults": faults,
    }


def main() -> int:
    """Run the cases and return 1 if one of them was a fault."""
    own = outcome_parser("Load malformed profiles.", f"{CASES} cases", seed="the cases")
    options = own.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = run(max(1, round(CASES * options.share)), options.seed, Path(folder))
    faults = list(result["faults"])
    if result["growth_mb"] > MOST_GROWTH_MB:
        faults.append(f"the process grew by {result['growth_mb']} MB, more than {MOST_GROWTH_MB}")
    return finish(result, faults, options.output)


if __name__ == "__main__":
    sys.exit(main())
