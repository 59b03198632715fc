"""One rank of a tiny calibration: what ``torchrun`` starts in the tests of ranks."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import tiny_job
import torch
from small_models import make_model
from torch import nn


def make_dying() -> nn.Module:
    """A model whose process is killed in rank 1, in the first pass that is reduced."""
    model = make_model(seed=4)

    def die(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        if os.environ["RANK"] == "1" and tiny_job.applied_schedule(model) is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    model.aggregator.global_blocks[0].attn.proj.register_forward_pre_hook(die)
    return model


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        tiny_job.place(patch, Path.cwd())
        sys.exit(tiny_job.main(sys.argv[1:]))
