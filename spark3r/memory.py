"""Peak memory of a call, and calls that run out of memory."""

from __future__ import annotations

import ctypes
import errno
import gc
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
_LACKING = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "failed to map segment",
    "could not create a primitive",  # oneDNN does not say why
)


def peak_extra_mb(call: Callable[[], object], device: torch.device | str = "cpu") -> float | None:
    """Run a call and return how far memory rose above its level before, in MB (10⁶ bytes).

    On CUDA that is memory from PyTorch's allocator, on the CPU the resident memory of the process
    by the kernel's high-water mark. The call's result counts, and is dropped afterwards.

    Args:
        call: The call, run once, also where memory cannot be measured.
        device: Device on which it does its work.

    Returns:
        None where memory cannot be measured: on a CPU without Linux's ``/proc``, or another device.
    """
    before = reset_peak(device)
    call()
    peak = peak_bytes(device)
    return None if before is None or peak is None else max(0, peak - before) / 1e6


def reset_peak(device: torch.device | str = "cpu") -> int | None:
    """Let the peak of memory begin anew, and return the bytes in use.

    Args:
        device: A CUDA device, for memory from PyTorch's allocator; the CPU, for the resident memory
            of the process.

    Returns:
        None where memory cannot be measured, see `peak_extra_mb`.
    """
    import torch

    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    if device.type != "cpu" or not _CLEAR.exists():  # Windows has no C library without a name
        return None
    try:
        _return_freed()
        _CLEAR.write_text("5")  # resets the high-water mark
        return _status_bytes("VmRSS")
    except OSError:
        return None


def peak_bytes(device: torch.device | str = "cpu") -> int | None:
    """Return the peak of memory in bytes since `reset_peak`, None where it cannot be measured."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        return _status_bytes("VmHWM") if device.type == "cpu" else None
    except OSError:
        return None


def free_bytes(
    device: torch.device | str = "cpu", *, cgroup: Path | None = None, meminfo: Path = _MEMINFO
) -> int | None:
    """Return the bytes that a new allocation may take, None where that is not known.

    Args:
        device: A CUDA device, for what its driver and PyTorch's allocator have free; the CPU, for
            the available memory of the machine, or what is left of the control group's limit.
        cgroup: Folder of a control group of version 2; None for that of this process.
        meminfo: The kernel's ``/proc/meminfo``.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    if device.type != "cpu":
        return None
    try:
        lines = meminfo.read_text(encoding="utf-8").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return min([int(available.split()[1]) * 1024, *_left_in_groups(cgroup or own_control_group())])


def _left_in_groups(folder: Path) -> Iterator[int]:
    """Yield what is left of the limit of a control group, and of those that it is in."""
    while folder.is_dir():
        try:
            limit, used, stat = (
                (folder / f"memory.{name}").read_text() for name in ("max", "current", "stat")
            )
            if limit.strip() != "max":
                cached = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)
                yield max(0, int(limit) - int(used) + int(cached[1] if cached else 0))
        except (OSError, ValueError):
            return  # the root has no limit
        folder = folder.parent


def own_control_group(
    process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Path:
    """Return the folder of this process's control group of version 2."""
    try:
        entries = process.read_text(encoding="utf-8").splitlines()
    except OSError:
        return root
    own = next((line[3:] for line in entries if line.startswith("0::")), "/")
    return root / own.strip("/")


def fits_into_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> bool:
    """Run a call and return True, or False if it ran out of memory. Raise any other error.

    Args:
        call: The call.
        device: Device on which it does its work. What a failed call left in the cache of a CUDA
            device's allocator is released.
    """
    try:
        call()
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Only here: inside the handler the traceback still holds the call's tensors.
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory of the host or a device was not enough."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    torch = sys.modules.get("torch")  # it may be what did not fit
    if isinstance(error, getattr(getattr(torch, "cuda", None), "OutOfMemoryError", ())):
        return True
    # The CPU allocator, some backends and the loader of libraries raise plain errors.
    text = str(error).lower()
    return isinstance(error, RuntimeError | ImportError) and any(each in text for each in _LACKING)


def _return_freed() -> None:
    """Return freed memory to the system; a call could use it again without a rise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no field {field}")
