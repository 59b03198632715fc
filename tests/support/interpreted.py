"""Skip tests of Triton kernels that need its interpreter, which runs them on a CPU.

`conftest` switches it on where there is no GPU.
"""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is off where there is a GPU", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")
