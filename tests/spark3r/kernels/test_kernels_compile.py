"""Triton compiles our kernels for GPUs, which takes no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from spark3r.kernels.nearest_triton import DESTINATIONS, SOURCES, _nearest
from spark3r.kernels.norm_rope_triton import TOKENS, _norm_rope


def compiled(kernel, capability, constants, types):
    names = {name: types.get(name, "i32") for name in kernel.arg_names}
    names |= dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(fn=kernel, signature=names, constexprs=constants)
    options = {"enable_fp_fusion": True}
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(kernel.__name__, capability, len(found.asm["cubin"]) > 0)


switches = dict.fromkeys(("NORM", "WEIGHT", "BIAS", "ROTATE", "ROWS"), True)
tables = dict.fromkeys(("weight", "bias", "cos", "sin"), "*fp32")
others = {"tokens": "*bf16", "output": "*bf16", "rows": "*i64", "batch_stride": "i64"}
for capability in (80, 90):
    sizes = {"QUARTER": 16, "TOKENS": TOKENS}
    compiled(_norm_rope, capability, switches | sizes, tables | others | {"eps": "fp32"})
sizes = {"FEATURES": 64, "SOURCES": SOURCES, "DESTINATIONS": DESTINATIONS}
compiled(_nearest, 90, sizes, {"source": "*fp32", "destination": "*fp32", "found": "*i64"})
"""


@pytest.mark.slow
def test_kernels_compile_for_ampere_and_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split("\n")[:-1] == [
        "_norm_rope 80 True",
        "_norm_rope 90 True",
        "_nearest 90 True",
    ]
