"""What every test shares: one thread, small models."""

from __future__ import annotations

import pytest
import torch
from small_models import make_model
from torch import nn

torch.set_num_threads(1)


@pytest.fixture
def model() -> nn.Module:
    """The reference architecture with two layer pairs and random weights: fast, and whole."""
    return make_model()
