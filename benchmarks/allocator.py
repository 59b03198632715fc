"""Memory settings of the C library that make times on a CPU grow with the work."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next tensor, as a GPU's allocator does.

    By default glibc maps every tensor of more than 32 MB anew, and each of its pages costs a fault:
    a block on eight times the frames then takes fourteen times as long. The setting holds for the
    whole process.

    Returns:
        Whether the C library accepted the setting; only glibc does.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    mallopt = getattr(library, "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
