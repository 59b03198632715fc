"""On a GPU the Triton kernels pass their trials."""

from __future__ import annotations

import pytest
import torch

from spark3r.kernels import choices, nearest, norm_rope

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norm_and_rotation(dtype: torch.dtype) -> None:
    assert norm_rope.implementation(DEVICE, dtype, 64) == norm_rope.TRITON, choices()


def test_matching() -> None:
    assert nearest.implementation(DEVICE, torch.float32, 64) == nearest.TRITON, choices()
