"""Freed memory is kept where a script asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from benchmark_scripts import environment

PROGRAM = """
import torch
from allocator import keep_freed_memory
from spark3r.memory import peak_extra_mb, _status_bytes
assert keep_freed_memory()
before = _status_bytes("VmRSS")
block = torch.ones(24 * 2**20)  # 96 MiB, beyond what glibc would keep
del block
assert _status_bytes("VmRSS") - before > 90 * 2**20, "kept"
peak_mb = peak_extra_mb(lambda: torch.ones(24 * 2**20))
assert 90 < peak_mb < 130, peak_mb
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_kept_and_given_back_before_a_peak_is_measured() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, env=environment())
