"""Peak memory of a call on the CPU, from the kernel's high-water mark (Linux only)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _status_kb(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no field {field}")


def peak_extra_mb(call: Callable[[], object]) -> float:
    """Return how far the resident memory rose above its level before the call, in MB (10^6 B).

    The call's result counts; it is dropped afterwards.
    """
    gc.collect()
    _CLEAR.write_text("5")  # reset the high-water mark
    before = _status_kb("VmRSS")
    call()
    return max(0, _status_kb("VmHWM") - before) * 1024 / 1e6
