"""Which attention kernels π³'s reduced layers may take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.backends import cuda

from spark3r import TokenLayout
from spark3r.families.parts.pinned import pinned_kernels
from spark3r.reduction.operators import Operators, TokenStride
from spark3r.reduction.plans import select
from spark3r.reduction.rule import ResolvedRule

BIASED = select(
    TokenLayout(6, 2, 3, special=2),
    ResolvedRule(1, 2, Operators(key_value=TokenStride(keep_special=True, mass_correction=1.0))),
    torch.device("cpu"),
)
UPSTREAM = {"flash": False, "efficient": True, "math": True}
FLASH = {"flash": True, "efficient": False, "math": False}
ALL = dict.fromkeys(UPSTREAM, True)


@pytest.mark.parametrize(
    ("device", "dtype", "selection", "expected"),
    [
        ("cpu", torch.float32, None, UPSTREAM),
        ("cpu", torch.bfloat16, None, FLASH),
        ("cpu", torch.bfloat16, BIASED, UPSTREAM),  # flash attention takes no mask
        ("cuda", torch.float32, None, UPSTREAM),
        ("cuda", torch.bfloat16, None, ALL),
        ("cuda", torch.bfloat16, BIASED, ALL),
        ("cuda", torch.float16, None, ALL),
    ],
)
def test_kernels_are_upstreams_except_in_half_precision_on_cuda(
    device: str, dtype: torch.dtype, selection: Any, expected: dict[str, bool]
) -> None:
    value: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
    with pinned_kernels(value, selection):
        enabled = {
            "flash": cuda.flash_sdp_enabled(),
            "efficient": cuda.mem_efficient_sdp_enabled(),
            "math": cuda.math_sdp_enabled(),
        }
    assert enabled == expected
