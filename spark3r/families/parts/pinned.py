"""The attention kernels that π³'s code restricts itself to, and copies of it do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...reduction.pruning import KeySelection


def pinned_kernels(value: Tensor, selection: KeySelection | None) -> AbstractContextManager[None]:
    """Return the context that restricts attention to the kernels that upstream restricts itself to.

    In half precision on CUDA that is flash alone. A reduced layer leaves the choice to torch there,
    because cuDNN's kernel is the faster one on newer cards, and flash attention takes no mask.
    """
    half = value.dtype in (torch.bfloat16, torch.float16)
    if half and value.device.type == "cuda":
        return nullcontext()
    biased = selection is not None and selection.logit_bias is not None
    if value.dtype == torch.bfloat16 and not biased:
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION])
