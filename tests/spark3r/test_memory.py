from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spark3r import memory
from spark3r.cli.failure import failure_text
from spark3r.memory import is_out_of_memory, peak_extra_mb


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark")
def test_memory_freed_before_the_end_counts_towards_the_peak() -> None:
    def call() -> torch.Tensor:
        torch.ones(16 * 2**20)  # 64 MiB that are dropped before the result is made
        return torch.ones(1)

    peak_mb = peak_extra_mb(call)
    assert peak_mb is not None
    assert 60 < peak_mb < 130


def test_peak_memory_is_none_where_it_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: object) -> None:  # as on Windows
        raise TypeError("bad argument type for built-in operation")

    monkeypatch.setattr(memory, "_CLEAR", Path("/nonexistent/clear_refs"))
    monkeypatch.setattr(memory.ctypes, "CDLL", no_library)
    calls: list[str] = []
    assert peak_extra_mb(lambda: calls.append("cpu")) is None
    assert peak_extra_mb(lambda: calls.append("meta"), "meta") is None
    assert calls == ["cpu", "meta"]
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
    ],
)
def test_errors_that_say_otherwise_that_memory_was_not_enough(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(type(error)("something else"))
    text = failure_text(error, "give fewer --frames")
    assert text.startswith("out of memory: give fewer --frames, or make more memory free (")


def test_memory_is_named_where_torch_is_what_did_not_fit() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from spark3r.memory import is_out_of_memory\n"
        "assert is_out_of_memory(ImportError('libtorch: failed to map segment'))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
