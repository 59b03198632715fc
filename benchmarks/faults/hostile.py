"""Hostile profiles and weights: code, bombs, links, pipes, devices, names that steer a terminal.

    python benchmarks/faults/hostile.py --output benchmarks/results/faults_hostile.json
    python benchmarks/faults/hostile.py --share 0.01

Each file of a list is read in a process of its own. It must be refused by an error that names it,
within a second of CPU time, without running its code and without more memory than a profile or a
small checkpoint needs. Then whole checkpoints are damaged byte by byte. Each must be refused, or be
read as tensors.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from spark3r.errors import Spark3rError, printable
from spark3r.loading.checkpoints import inside, read_checkpoint
from spark3r.profile import Profile, load_profile

sys.path.append(str(Path(__file__).parents[1]))
from faults.outcome import finish, outcome_parser

MOST_SECONDS = 1.0
MOST_GROWTH_MB = 150
HANG_SECONDS = 20
DAMAGED = 20_000
GIB = 2**30

Case = tuple[str, Callable[[], object]]


class Code:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def profiles(folder: Path) -> list[Case]:
    """Write profiles and return what reads each."""
    shipped = Profile.load(Path(__file__).parents[2] / "profiles" / "reference.json")
    document = json.loads(shipped.text())

    def with_changes(**changes: Any) -> str:
        return json.dumps({**document, **changes})

    texts = {
        "nested lists": "[" * 4_000_000,
        "nested objects": '{"a":' * 500_000,
        "nested in a field": with_changes(notes=0).replace("0", "[" * 500 + "]" * 500, 1),
        "a million numbers": "[" + "1," * 1_000_000 + "1]",
        "a million keys": "{" + ",".join(f'"k{i}":1' for i in range(300_000)) + "}",
        "a key given a million times": "{" + ",".join(['"a":1'] * 500_000) + "}",
        "a number of a million digits": with_changes(version=0).replace("0", "9" * 1_000_000, 1),
        "9,000 measurements": with_changes(measurements=[{}] * 9_000),
        "90,000 measurements": with_changes(measurements=[{}] * 90_000),
        "9,000 schedules": with_changes(schedules=[{}] * 9_000),
        "80,000 unknown keys": with_changes(**{f"k{i}": 1 for i in range(80_000)}),
        "control characters": with_changes(**{"\x1b[2J\x1b]0;x\x07": 1}),
        "a surrogate": with_changes(notes="\ud800"),
        "a pickle": "\x80\x04K\x01.",
        "a gigabyte in one string": '{"format": "' + "x" * 5_000_000,
    }
    found = []
    for number, (name, text) in enumerate(texts.items()):
        path = folder / f"{number}.json"
        path.write_text(text)
        found.append((f"profile: {name}", path))
    sparse, pipe, loop = folder / "sparse.json", folder / "pipe.json", folder / "loop.json"
    with sparse.open("wb") as file:
        file.truncate(10 * GIB)
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    (folder / "words.json").symlink_to("/etc/passwd")
    (folder / "device.json").symlink_to("/dev/zero")
    found += [
        ("profile: 10 GiB, sparse", sparse),
        ("profile: a pipe that nobody writes to", pipe),
        ("profile: a link to itself", loop),
        ("profile: a link to a file that is no profile", folder / "words.json"),
        ("profile: a link to a device", folder / "device.json"),
        ("profile: a folder", folder),
    ]
    special = ("/dev/zero", "/dev/urandom", "/dev/tty", "/proc/self/mem")
    found += [(f"profile: {name}", Path(name)) for name in special]
    found += [("profile: a NUL in the path", Path("a\0b.json"))]
    found += [("profile: a path of 5,000 letters", Path("x" * 5_000 + ".json"))]
    found += [("profile: out of the folder", Path("../../../../etc/passwd"))]
    names = ["../vggt-1b", "vggt-1b\0", "/etc/passwd", "\x1b[2J", "x" * 5_000]
    cases: list[Case] = [(name, partial(load_profile, path)) for name, path in found]
    return cases + [
        (f"profile by name: {name[:20]!r}", partial(load_profile, name)) for name in names
    ]


def weights(folder: Path, canary: Path) -> list[Case]:
    """Write checkpoints and return what reads each."""
    small = {"weight": torch.zeros(4)}
    found: list[tuple[str, Path]] = []

    def add(name: str, suffix: str, content: bytes) -> None:
        path = folder / f"{len(found)}{suffix}"
        path.write_bytes(content)
        found.append((name, path))

    def saved(name: str, content: object, **options: Any) -> None:
        path = folder / f"{len(found)}.pt"
        torch.save(content, path, **options)
        found.append((name, path))

    def archive(name: str, entries: dict[str, bytes], method: int) -> None:
        path = folder / f"{len(found)}.pt"
        with zipfile.ZipFile(path, "w", method) as file:
            for entry, content in entries.items():
                file.writestr(entry, content)
        found.append((name, path))

    def header(name: str, content: Any, length: int | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        size = struct.pack("<Q", len(raw) if length is None else length)
        add(name, ".safetensors", size + raw)

    add("code in a pickle", ".pt", pickle.dumps(Code(canary)))
    add("code beside tensors in a pickle", ".bin", pickle.dumps({"a": small, "b": Code(canary)}, 2))
    saved("code beside tensors", {**small, "x": Code(canary)})
    saved(
        "code in the old format",
        {**small, "x": Code(canary)},
        _use_new_zipfile_serialization=False,
    )
    saved("a whole module", torch.nn.Linear(2, 2))
    add("code with a safetensors name", ".safetensors", pickle.dumps(Code(canary)))

    start = {"a/version": b"3\n", "a/byteorder": b"little"}
    bomb = b"\x80\x02" + b"N0" * 25_000_000
    archive("a pickle that unpacks to 50 MB", {**start, "a/data.pkl": bomb}, zipfile.ZIP_DEFLATED)
    archive("a tensor that unpacks to 100 MB", {"a/data/0": bytes(10**8)}, zipfile.ZIP_DEFLATED)
    archive("a large pickle", {**start, "a/data.pkl": bomb[:20_000_000]}, zipfile.ZIP_STORED)
    doubled = b"\x80\x02}N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"Ns."
    archive("a tuple doubled 60 times", {**start, "a/data.pkl": doubled}, zipfile.ZIP_STORED)
    nested = b"\x80\x02}N" + b"\x85" * 5_000_000 + b"Ns."
    archive("5,000,000 nested tuples", {**start, "a/data.pkl": nested}, zipfile.ZIP_STORED)
    archive("no pickle", {"hello": b"world"}, zipfile.ZIP_STORED)
    add("5,000,000 nested lists", ".pt", b"\x80\x02" + b"]" * 5_000_000)
    add("a string of 2^40 bytes", ".pt", b"\x80\x04\x8d" + struct.pack("<Q", 2**40))
    add("bytes of 2^62", ".pt", b"\x80\x04\x8e" + struct.pack("<Q", 2**62))
    add("an integer of 2 GB", ".pt", b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1))
    add("half an archive", ".pt", b"PK\x03\x04" + bytes(1000))
    add("an empty file", ".pt", b"")
    add("text", ".pth", b"hello\n")

    header("a header of 10 GB", b"{}", 10 * GIB)
    header("a header nested deeply", b'{"a":' * 100_000)
    one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header("300,000 tensors", {f"t{i}": one for i in range(300_000)})
    header("a tensor of 4 TB", {"a": {**one, "shape": [2**40], "data_offsets": [0, 2**42]}})
    header("a size that overflows", {"a": {**one, "shape": [2**62, 4]}})
    for suffix, first in ((".pt", b"\x80\x02"), (".safetensors", b"")):
        path = folder / f"sparse{suffix}"
        with path.open("wb") as file:
            file.write(first)
            file.truncate(10 * GIB)
        found.append((f"10 GiB, sparse, {suffix}", path))
        os.mkfifo(folder / f"pipe{suffix}")
        found.append((f"a pipe, {suffix}", folder / f"pipe{suffix}"))
    found += [(name, Path(name)) for name in ("/dev/zero", "a\0b.pt", "x" * 5_000 + ".pt")]
    cases: list[Case] = [
        (f"weights: {name[:40]!r}", partial(read_checkpoint, path)) for name, path in found
    ]

    save_file(small, folder / "outside.safetensors")
    for name, target in (("file", "../outside.safetensors"), ("device", "/dev/zero")):
        inner = folder / name
        inner.mkdir()
        (inner / "model.safetensors").symlink_to(target)
        cases.append(
            (
                f"weights: a folder whose link leads out to a {name}",
                partial(read_folder, inner),
            )
        )
    return cases


def read_folder(folder: Path) -> object:
    """Read a folder of weights as ``--model FAMILY:FOLDER`` does."""
    return read_checkpoint(inside(folder, "model.safetensors"))


def in_a_child(call: Callable[[], object]) -> tuple[str, float, float]:
    """Run a call in a forked process; return its outcome, CPU seconds and growth in MB."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(HANG_SECONDS)  # without a handler it ends the process, whatever it waits for
        before = peak_mb()
        started = time.process_time()
        try:
            call()
            outcome = "fault: accepted"
        except Spark3rError as error:
            outcome = f"refused: {printable(str(error))[:200]}"
        except BaseException as error:
            outcome = f"fault: {type(error).__name__}: {str(error)[:160]}"
        figures = (outcome, time.process_time() - started, peak_mb() - before)
        os.write(sender, json.dumps(figures).encode())
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as file:
        answer = file.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        return f"fault: ended by signal {os.WTERMSIG(status)}", HANG_SECONDS, 0.0
    outcome, seconds, growth = json.loads(answer)
    return outcome, seconds, growth


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read_all(cases: list[Case], canary: Path) -> list[dict[str, Any]]:
    """Return what became of each case, without the folder that holds the files and the canary."""
    rows = []
    for name, call in cases:
        outcome, seconds, growth = in_a_child(call)
        if canary.exists():
            outcome = "fault: its code ran"
            canary.unlink()
        elif seconds > MOST_SECONDS:
            outcome = f"fault: {seconds:.1f} s; {outcome}"
        elif growth > MOST_GROWTH_MB:
            outcome = f"fault: {growth:.0f} MB; {outcome}"
        outcome = outcome.replace(f"{canary.parent}/", "")
        rows.append({"case": name, "outcome": outcome, "cpu_s": round(seconds, 3)})
    return rows


def damaged_weights(count: int, seed: int, folder: Path, canary: Path) -> dict[str, Any]:
    """Damage whole checkpoints byte by byte and read them in this process."""
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    torch.save(tensors, folder / "a.pt")
    torch.save(tensors, folder / "b.bin", _use_new_zipfile_serialization=False)
    save_file(tensors, folder / "c.safetensors")
    whole = [(path.suffix, path.read_bytes()) for path in sorted(folder.glob("[abc].*"))]
    counts: Counter[str] = Counter()
    faults, slowest = [], 0.0
    for number in range(count):
        chance = random.Random(f"{seed}-{number}")
        suffix, raw = chance.choice(whole)
        data = bytearray(raw)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.1:
            del data[chance.randrange(len(data)) :]
        path = folder / f"damaged{suffix}"
        path.write_bytes(data)
        started = time.process_time()
        try:
            read_checkpoint(path)
            result = "read"
        except Spark3rError:
            result = "refused"
        except Exception as error:
            result = f"{type(error).__name__}: {str(error)[:160]}"
            faults.append({"case": number, "suffix": suffix, "fault": result})
            result = "fault"
        slowest = max(slowest, time.process_time() - started)
        counts[f"{suffix}, {result}"] += 1
    if canary.exists() or slowest > MOST_SECONDS:
        faults.append({"fault": f"code ran: {canary.exists()}; slowest {slowest:.1f} s"})
    return {
        "cases": count,
        "seed": seed,
        "outcomes": dict(sorted(counts.items())),
        "slowest_case_cpu_s": round(slowest, 3),
        "faults": faults,
    }


def main() -> int:
    """Read everything and return 1 if one of the files was a fault."""
    parser = outcome_parser(
        "Read hostile profiles and weights.", f"{DAMAGED} damaged checkpoints", seed="the damage"
    )
    options = parser.parse_args()
    output = None if options.output is None else options.output.resolve()
    torch.set_num_threads(1)
    load_profile("vggt-1b")  # imports
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        canary = folder / "canary"
        for inner in ("profiles", "weights", "damaged"):
            (folder / inner).mkdir()
        os.chdir(folder / "profiles")
        rows = read_all(profiles(folder / "profiles") + weights(folder / "weights", canary), canary)
        damaged = damaged_weights(
            max(1, round(DAMAGED * options.share)), options.seed, folder / "damaged", canary
        )
        os.chdir(folder.parent)
    bad = [row for row in rows if row["outcome"].startswith("fault")]
    result = {"files": rows, "damaged_weights": damaged}
    return finish(result, [*bad, *damaged["faults"]], output)


if __name__ == "__main__":
    sys.exit(main())
