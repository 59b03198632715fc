"""The profile's evidence names the kernels that ran, and why others did not."""

from __future__ import annotations

import pytest
import torch

from calibrate.report.profile import kernel_records
from spark3r.kernels import trials
from spark3r.kernels.trials import Choice
from spark3r.profile.evidence import KernelRecord, RefusedKernel


def test_kernels_are_those_of_the_device_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = (("cudnn", "it raised RuntimeError: no engine"),)
    made = (
        Choice("attention with mass correction", "cuda:0", "bfloat16", 64, "flash", refused),
        Choice("attention with mass correction", "cuda:0", "float32", 64, "efficient"),
        Choice("attention with mass correction", "cuda:1", "bfloat16", 64, "mask"),
        Choice("matching", "cuda:0", "float32", 64, "triton"),
    )
    monkeypatch.setattr(trials, "_choices", dict(enumerate(made)))
    found = kernel_records(torch.device("cuda:0"), torch.bfloat16)
    assert sorted(found, key=lambda record: record.operation) == [
        KernelRecord(
            operation="attention with mass correction",
            implementation="flash",
            refused=(
                RefusedKernel(implementation="cudnn", reason="it raised RuntimeError: no engine"),
            ),
        ),
        KernelRecord(operation="matching", implementation="triton"),
    ]
    assert kernel_records(torch.device("cpu"), torch.float32) == ()
