"""Clips that a kernel of PyTorch would get wrong are refused by name."""

from __future__ import annotations

import pytest
import torch

from spark3r import LayoutError
from spark3r.kernels.limits import refuse_wrong_norm

FRAMES, PER_FRAME, WIDTH = 4030, 1041, 1024  # of VGGT at 518x392


class _Tokens:
    """What the check reads of a tensor; a real one on CUDA would need a card with 17 GB."""

    def __init__(self, frames: int, device: str = "cuda") -> None:
        self.device = torch.device(device)
        self._numel = frames * PER_FRAME * WIDTH

    def numel(self) -> int:
        return self._numel


def test_a_clip_that_layer_norm_gets_wrong_is_refused_with_the_longest_that_it_gets_right() -> None:
    with pytest.raises(LayoutError, match=r"4030 frames.*torch 2\.11\.0\+cu130.*at most 4029"):
        refuse_wrong_norm(_Tokens(FRAMES), FRAMES, "2.11.0+cu130")
    refuse_wrong_norm(_Tokens(FRAMES - 1), FRAMES - 1, "2.11.0+cu130")


def test_other_devices_and_versions_with_the_fix_are_not_concerned() -> None:
    refuse_wrong_norm(_Tokens(FRAMES, "cpu"), FRAMES, "2.11.0")
    for version in ("2.13.0", "2.14.0a0+git1", "3.0"):
        refuse_wrong_norm(_Tokens(FRAMES), FRAMES, version)
