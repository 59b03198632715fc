"""Malformed images and videos: bytes flipped, cut, dropped, repeated, and headers that lie.

    python benchmarks/faults/footage.py --output benchmarks/results/faults_footage.json
    python benchmarks/faults/footage.py --share 0.01

Each case starts from an image or a video that ffmpeg made or Pillow wrote, and damages its file.
One case in ten is left whole. Every file is then read by spark3r and by ffmpeg in its strictest
mode, ``-xerror -err_detect explode``. These are faults:

- spark3r raises anything but an error that names the file, dies, or takes longer than a case may;
- ffmpeg refuses a file, and spark3r reads it without a word; for an image, unless its pixels are
  those of the whole file; for a TIFF file, whose unknown tags a strict ffmpeg refuses, unless they
  are those of an ffmpeg that is not strict;
- both read a whole file, and a frame differs by more than 2 levels, a JPEG file by more than 3;
- spark3r refuses a whole file that ffmpeg reads;
- with ``skip_bad``, spark3r raises anything but an error that too few frames are left.

Damage that both read in silence is counted. Images of one format are read by one ffmpeg for many
cases, which saves its start; whatever only spark3r reads, and a sample of the others, is read again
by an ffmpeg of its own.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spark3r.errors import ClipError
from spark3r.io import decoding
from spark3r.io.frames import FrameSelection
from spark3r.io.images import read_image
from spark3r.io.video import read_video

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
from ffmpeg_program import H264, ffmpeg, program

from faults.outcome import finish, outcome_parser

IMAGES, VIDEOS = 20_000, 2_000
MOST_SECONDS = 5.0
"""CPU time that a case may take. Other work on the machine does not count."""
HANG_SECONDS = 60.0
"""Time on the clock after which a case is stopped. It covers waiting."""
MOST_LEVELS = 2
MOST_LEVELS_JPEG = 3
"""Decoders may differ by one level of luma and of chroma, which makes up to three of a colour."""
WHOLE = 0.1
"""Share of the cases that are left whole."""
AGAIN = 0.02
"""Share of the images that both read, which an ffmpeg of its own reads again."""
BATCH = 250
MOST_PIXELS = 89_478_485
"""Pixels of the largest image that Pillow reads without a warning."""

Pixels = NDArray[np.uint8]


def image_bases(chance: random.Random) -> dict[str, tuple[str, list[bytes]]]:
    """Return images by kind: the decoder of ffmpeg, and the content of some files.

    Pillow interpolates the chroma of a JPEG or WebP file and ffmpeg repeats it, so these files have
    as much chroma as luma.
    """
    pictures = [_picture(chance) for _ in range(6)]

    def saved(mode: str, kind: str, **options: Any) -> list[bytes]:
        files = []
        for picture in pictures:
            file = io.BytesIO()
            picture.convert(mode).save(file, kind, **options)
            files.append(file.getvalue())
        return files

    return {
        "jpg": ("mjpeg", saved("RGB", "JPEG", subsampling=0, quality=90)),
        "jpg progressive": (
            "mjpeg",
            saved("RGB", "JPEG", subsampling=0, quality=90, progressive=True),
        ),
        "jpg gray": ("mjpeg", saved("L", "JPEG", restart_marker_rows=1)),
        "png": ("png", saved("RGB", "PNG")),
        "png palette": ("png", saved("P", "PNG")),
        "webp": ("webp", saved("RGB", "WEBP", lossless=True)),
        "bmp": ("bmp", saved("RGB", "BMP")),
        "tif": ("tiff", saved("RGB", "TIFF")),
        "tif packed": ("tiff", saved("RGB", "TIFF", compression="tiff_lzw")),
        "ppm": ("ppm", saved("RGB", "PPM")),
    }


def _picture(chance: random.Random) -> Image.Image:
    generator = np.random.default_rng(chance.randrange(2**32))
    height, width = chance.randrange(20, 70), chance.randrange(20, 70)
    coarse = generator.integers(0, 255, (8, 8, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = generator.integers(-6, 7, (height, width, 3))
    return Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8))


SMALL = ("-f", "lavfi", "-i", "testsrc2=s=64x48:r=10:d=1.6")
VIDEO_BASES: dict[str, tuple[str, ...]] = {
    "h264.mp4": (*H264, "-g", "5"),
    "fast.mp4": (*H264, "-g", "5", "-movflags", "faststart"),
    "fragments.mp4": (*H264, "-g", "5", "-movflags", "frag_keyframe+empty_moov"),
    "h264.mkv": (*H264, "-g", "5"),
    "h264.ts": (*H264, "-g", "5"),
    "h264.avi": (*H264, "-g", "5"),
    "h264.flv": (*H264, "-g", "5"),
    "h264.h264": (*H264, "-g", "5"),
    "mpeg4.avi": ("-c:v", "mpeg4", "-bf", "2", "-g", "5"),
    "mpeg2.mpg": ("-c:v", "mpeg2video", "-r", "25", "-bf", "2", "-g", "6"),
    "vp8.webm": ("-c:v", "libvpx", "-g", "5"),
    "vp9.webm": ("-c:v", "libvpx-vp9", "-g", "5"),
    "hevc.mp4": ("-c:v", "libx265", "-x265-params", "log-level=none:keyint=5:pools=1"),
    "mjpeg.avi": ("-c:v", "mjpeg"),
    "mjpeg.mov": ("-c:v", "mjpeg"),
    "prores.mov": ("-c:v", "prores_ks"),
    "ffv1.mkv": ("-c:v", "ffv1"),
    "raw.avi": ("-c:v", "rawvideo", "-pix_fmt", "bgr24"),
}


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return the bytes of a file with a part of them wrong."""
    raw = bytearray(data)
    match chance.randrange(7):
        case 0:  # bits flip
            for _ in range(chance.choice((1, 1, 2, 8, 50))):
                raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        case 1:  # the end is lost
            del raw[chance.randrange(len(raw)) :]
        case 2:  # a part is lost
            start = chance.randrange(len(raw))
            del raw[start : start + chance.choice((1, 4, 64, 1024))]
        case 3:  # a part was never written
            start, length = chance.randrange(len(raw)), chance.choice((1, 16, 512, 4096))
            raw[start : start + length] = bytes(len(raw[start : start + length]))
        case 4:  # a part is there twice
            start, length = chance.randrange(len(raw)), chance.choice((4, 64, 1024))
            raw[start:start] = raw[start : start + length]
        case 5:  # something else is there
            start, length = chance.randrange(len(raw)), chance.choice((1, 4, 64))
            raw[start : start + length] = chance.randbytes(length)
        case _:  # a number in the header, or in an index at the end, lies
            ends = (range(min(800, len(raw))), range(max(0, len(raw) - 800), len(raw)))
            start = chance.choice(chance.choice(ends))
            size, order = chance.choice((1, 2, 4, 8)), chance.choice(("big", "little"))
            value = chance.choice((0, 1, 2 ** (8 * size) - 1, chance.randrange(2 ** (8 * size))))
            raw[start : start + size] = value.to_bytes(size, "big" if order == "big" else "little")
    return bytes(raw)


def in_children(count: int, work: Callable[[int], Any]) -> Iterator[Any]:
    """Yield the result of ``work(0)``, ``work(1)`` ..., each of which may die or never end.

    They run in a forked process, which is replaced when it dies or takes too long. The result of
    such a case is a text that begins with ``fault``.
    """
    number = 0
    while number < count:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _run_and_report(range(number, count), work, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as results:
            while number < count:
                line = _line_in_time(results, child)
                if not line.endswith(b"\n"):
                    break
                yield json.loads(line)
                number += 1
        _, status = os.waitpid(child, 0)
        if number < count:
            signalled = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
            late = signalled == signal.SIGKILL
            yield f"fault: no end after {HANG_SECONDS} s" if late else f"fault: died of {signalled}"
            number += 1


def _run_and_report(numbers: Sequence[int], work: Callable[[int], Any], writing: int) -> None:
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 2)  # libtiff writes what it thinks of a file
        for number in numbers:
            os.write(writing, json.dumps(work(number)).encode() + b"\n")
    finally:
        os._exit(0)


def _line_in_time(results: io.BufferedReader, child: int) -> bytes:
    def kill(*_: object) -> None:
        os.kill(child, signal.SIGKILL)

    before = signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        return results.readline()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def strict_ffmpeg(path: Path, *options: str) -> bool:
    """Return True if ffmpeg reads a file in its strictest mode."""
    command = [program(), "-nostdin", "-v", "quiet", "-threads", "1"]
    command += ["-max_pixels", str(MOST_PIXELS), "-xerror", "-err_detect", "explode", *options]
    command += ["-i", f"file:{path}", "-map", "0:v:0", "-fps_mode", "passthrough"]
    try:
        done = subprocess.run(
            [*command, "-f", "null", "-"], timeout=60, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def images_that_ffmpeg_reads(folder: Path, decoder: str, suffix: str) -> set[int]:
    """Return the numbers of the files of a folder, ``000.suffix`` ..., that ffmpeg decodes."""
    command = [program(), "-nostdin", "-v", "quiet", "-threads", "1"]
    command += ["-max_pixels", str(MOST_PIXELS), "-err_detect", "explode", "-f", "image2"]
    command += ["-framerate", "1", "-start_number", "0", "-c:v", decoder]
    command += ["-i", str(folder / f"%03d.{suffix}"), "-fps_mode", "passthrough"]
    command += ["-noautoscale", "-f", "framecrc", "-"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    frames = [line.split(",") for line in lines.splitlines() if not line.startswith("#")]
    return {int(frame[2]) for frame in frames}


def run_images(cases: int, seed: int, folder: Path) -> dict[str, Any]:
    """Return counts of outcomes of images, the slowest case and the faults."""
    chance = random.Random(seed)
    bases = image_bases(chance)
    counts: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    slowest, most = 0.0, 0
    kinds = list(bases)
    batch = min(BATCH, math.ceil(cases / len(kinds)))
    for start in range(0, cases, batch):
        kind = kinds[start // batch % len(kinds)]
        decoder, files = bases[kind]
        suffix = kind.partition(" ")[0]
        paths = [folder / f"{number:03}.{suffix}" for number in range(min(batch, cases - start))]
        origins, whole = [], []
        for path in paths:
            origins.append(chance.choice(files))
            whole.append(chance.random() < WHOLE)
            path.write_bytes(origins[-1] if whole[-1] else damaged(origins[-1], chance))
        read = images_that_ffmpeg_reads(folder, decoder, suffix)
        ours = in_children(len(paths), partial(_read_one, paths))
        for number, (path, result) in enumerate(zip(paths, ours, strict=True)):
            theirs = number in read
            fault = result if isinstance(result, str) else None
            outcome = "died" if fault else result["outcome"]
            if fault is None:
                slowest = max(slowest, result["seconds"])
                fault = result["fault"]
            if outcome == "read" and (not theirs or chance.random() < AGAIN):
                alone = strict_ffmpeg(path, "-f", "image2", "-pattern_type", "none")
                counts["read again by an ffmpeg of its own"] += 1
                theirs = alone
            if whole[number] and theirs:
                levels = _difference(path) if outcome == "read" else None
                most = max(most, levels or 0)
                allowed = MOST_LEVELS_JPEG if decoder == "mjpeg" else MOST_LEVELS
                if levels is None or levels > allowed:
                    fault = fault or f"fault: a whole file, {outcome}, differs by {levels} levels"
            state = "whole" if whole[number] else "damaged"
            if outcome == "read" and not theirs:
                if np.array_equal(_pixels(path), _pixels(io.BytesIO(origins[number]))):
                    outcome = "read with the pixels of the whole file"
                elif suffix == "tif" and _difference(path) == 0:
                    outcome = "read like an ffmpeg that is not strict"
                else:
                    fault = fault or "fault: ffmpeg refuses it"
            counts[f"{state}: {outcome}, by ffmpeg {'read' if theirs else 'refused'}"] += 1
            if fault:
                faults.append(_fault(start + number, kind, fault, path))
        for path in paths:
            path.unlink()
    return {
        "cases": cases,
        "outcomes": dict(sorted(counts.items())),
        "largest_difference_levels": most,
        "slowest_case_cpu_s": round(slowest, 3),
        "faults": faults,
    }


def _read_one(paths: Sequence[Path], number: int) -> dict[str, Any]:
    return _read_image(paths[number])


def _read_image(path: Path) -> dict[str, Any]:
    started = time.process_time()
    selection = FrameSelection(str(path.parent), None, skip_bad=True)
    fault = None
    try:
        frame = read_image(path, 0, selection, decoding.check_image)
    except Exception as error:
        return _outcome("refused", started, f"fault: {type(error).__name__}: {str(error)[:200]}")
    if frame is None and (len(selection.skipped) != 1 or path.name not in selection.skipped[0]):
        fault = "fault: refused without its name"
    return _outcome("refused" if frame is None else "read", started, fault)


def _outcome(outcome: str, started: float, fault: str | None) -> dict[str, Any]:
    seconds = time.process_time() - started
    if seconds > MOST_SECONDS:
        fault = fault or f"fault: {seconds:.1f} s of CPU time"
    return {"outcome": outcome, "seconds": seconds, "fault": fault}


def _pixels(file: Path | io.BytesIO) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))


def _difference(path: Path) -> int:
    """Return the largest difference between Pillow's and ffmpeg's pixels of an image."""
    ours = _pixels(path).astype(int).ravel()
    theirs = _raw_frames(path, "-f", "image2", "-pattern_type", "none")
    return int(abs(ours - theirs).max()) if ours.size == theirs.size else 255


def _raw_frames(path: Path, *options: str) -> Pixels:
    command = [program(), "-nostdin", "-v", "quiet", *options, "-i", f"file:{path}", "-map"]
    command += ["0:v:0", "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    return np.frombuffer(subprocess.run(command, capture_output=True, check=False).stdout, np.uint8)


def run_videos(cases: int, seed: int, folder: Path) -> dict[str, Any]:
    """Return counts of outcomes of videos, the slowest case and the faults."""
    chance = random.Random(seed)
    files = {}
    for name, options in list(VIDEO_BASES.items())[:cases]:
        ffmpeg(*SMALL, "-pix_fmt", "yuv420p", *options, "-threads", "1", folder / name)
        files[name] = (folder / name).read_bytes()
    names = list(files)
    plan = []
    for number in range(cases):
        name = names[number % len(names)]
        whole = chance.random() < WHOLE
        plan.append((name, whole, files[name] if whole else damaged(files[name], chance)))

    def path_of(number: int) -> Path:
        return folder / f"case{number}{Path(plan[number][0]).suffix}"

    def work(number: int) -> dict[str, Any]:
        path_of(number).write_bytes(plan[number][2])
        return _read_video(path_of(number))

    counts: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    slowest, most = 0.0, 0
    for number, result in enumerate(in_children(cases, work)):
        name, whole, _ = plan[number]
        path = path_of(number)
        fault = result if isinstance(result, str) else result["fault"]
        outcome = "died" if isinstance(result, str) else result["outcome"]
        theirs = strict_ffmpeg(path)
        if not isinstance(result, str):
            slowest = max(slowest, result["seconds"])
        if whole and theirs:
            levels = None
            if outcome == "read":
                raw = np.load(path.with_suffix(".npy"))
                expected = _raw_frames(path)
                if raw.size == expected.size:
                    levels = int(abs(raw.ravel().astype(int) - expected).max())
            most = max(most, levels or 0)
            if levels is None or levels > MOST_LEVELS:
                fault = fault or f"fault: a whole file, {outcome}, differs by {levels} levels"
        if outcome == "read" and not theirs:
            fault = fault or "fault: ffmpeg refuses it"
        state = "whole" if whole else "damaged"
        counts[f"{state}: {outcome}, by ffmpeg {'read' if theirs else 'refused'}"] += 1
        if fault:
            faults.append(_fault(number, name, fault, path))
        path.unlink()
        path.with_suffix(".npy").unlink(missing_ok=True)
    return {
        "cases": cases,
        "outcomes": dict(sorted(counts.items())),
        "largest_difference_levels": most,
        "slowest_case_cpu_s": round(slowest, 3),
        "faults": faults,
    }


def _read_video(path: Path) -> dict[str, Any]:
    started = time.process_time()
    outcome, fault = "read", None
    try:
        frames = list(read_video(path, FrameSelection(str(path), None, skip_bad=False)))
        sizes = {frame.image.size for frame in frames}
        if len(sizes) == 1:
            np.save(path.with_suffix(".npy"), np.stack([np.asarray(f.image) for f in frames]))
        if len(frames) < 2:  # which makes no clip
            outcome = "refused"
    except ClipError as error:
        outcome = "refused"
        if str(path) not in str(error):
            fault = "fault: refused without its name"
        fault = fault or _read_the_rest(path)
    except Exception as error:
        outcome, fault = "refused", f"fault: {type(error).__name__}: {str(error)[:200]}"
    return _outcome(outcome, started, fault)


def _read_the_rest(path: Path) -> str | None:
    selection = FrameSelection(str(path), None, skip_bad=True)
    try:
        times = [frame.time for frame in read_video(path, selection)]
    except ClipError:
        return None
    except Exception as error:
        return f"fault: with skip_bad, {type(error).__name__}: {str(error)[:200]}"
    if not selection.skipped:
        return "fault: with skip_bad, nothing is said to be skipped"
    return None if times == sorted(set(times)) else "fault: times do not ascend"


def _fault(number: int, kind: str, fault: str, path: Path) -> dict[str, Any]:
    kept = os.environ.get("SPARK3R_FAULTS")
    if kept and path.exists():
        shutil.copy(path, Path(kept) / f"{kind.replace(' ', '_')}.{number}{path.suffix}")
    return {"case": number, "kind": kind, "fault": fault}


def peak_mb() -> float:
    """Return the largest memory of a process that read cases, in MB."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> int:
    """Run the cases and return 1 if one of them was a fault."""
    parser = outcome_parser("Read malformed images and videos.", "the cases", seed="the cases")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "seed": options.seed,
            "images": run_images(max(1, round(IMAGES * options.share)), options.seed, Path(folder)),
            "videos": run_videos(max(1, round(VIDEOS * options.share)), options.seed, Path(folder)),
        }
    result |= {"seconds": round(time.monotonic() - started), "peak_mb": round(peak_mb())}
    faults = [fault for part in ("images", "videos") for fault in result[part]["faults"]]
    return finish(result, faults, options.output)


if __name__ == "__main__":
    sys.exit(main())
