"""What every test shares: one thread, small models, no GPU where there is none."""

from __future__ import annotations

import gc
import os

import pytest
import tiers
import torch
from small_models import make_model
from torch import nn

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Before anything imports Triton, whose own functions are marked for its interpreter, too.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    tiers.choose(config.option.markexpr)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    torch_version = tuple(map(int, torch.__version__.split(".")[:2]))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("dynamo") and torch_version < (2, 8):
            item.add_marker(pytest.mark.skip(reason="Dynamo traces a patched model from torch 2.8"))


def pytest_collection_finish() -> None:
    # What is imported by now stays. Looking through it takes half a second whenever a test collects
    # garbage, as the measurements of memory and latency do.
    gc.collect()
    gc.freeze()


@pytest.fixture
def model() -> nn.Module:
    """The reference architecture with two layer pairs and random weights: fast, and whole."""
    return make_model()
