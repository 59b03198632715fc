"""The environment record for bug reports; it names no machine and no user."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__

PACKAGES = (
    "torch",
    "numpy",
    "pydantic",
    "safetensors",
    "rich",
    "optuna",
    "scipy",
    "pandas",
    "matplotlib",
    "jinja2",
    "pillow",
    "av",
    "depth-anything-3",
    "vggt",
    "xformers",
    "flash-attn",
    "triton",
)
_DRIVER_TIMEOUT_S = 5

HEAD_DIM = 64
"""Size of an attention head in all four families."""


def environment() -> dict[str, Any]:
    """Return versions, hardware and settings that results depend on.

    The keys are always the same; an unknown value is None. The record holds no host name, user name
    or path.
    """
    import torch

    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    return {
        "spark3r": __version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": _versions(PACKAGES),
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "driver": _driver() if gpus else None,
        "cuda": torch.version.cuda or torch.version.hip,
        "sdpa_backends": _sdpa_backends(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def kernels() -> list[dict[str, Any]]:
    """Return which implementation of each operation every GPU runs, by precision.

    Kernels that were not tried yet are tried now. ``refused`` holds the reasons why a preferred one
    is not used. The list is empty without a GPU, because there is no choice then.
    """
    import torch

    from .kernels import choices, grouped_attention, nearest, norm_rope

    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            grouped_attention.implementation(device, dtype, HEAD_DIM)
            norm_rope.implementation(device, dtype, HEAD_DIM)
        nearest.implementation(device, torch.float32, HEAD_DIM)
    return [
        {
            "operation": choice.operation,
            "device": choice.device,
            "dtype": choice.dtype,
            "implementation": choice.implementation,
            "refused": dict(choice.refused),
        }
        for choice in choices()
    ]


def device_name(device: object) -> str:
    """Return the name of a device, as profiles record it: the GPU's, or the CPU's.

    Args:
        device: A torch device, or its name such as ``cuda:0``.
    """
    import torch

    found = torch.device(str(device))
    if found.type == "cpu":
        return cpu_name()
    return torch.cuda.get_device_name(found) if found.type == "cuda" else found.type


def cpu_name() -> str:
    """Return the model name of the processor, or its architecture when it has none."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _gpu(index: int) -> str:
    import torch

    found = torch.cuda.get_device_properties(index)
    return (
        f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute {found.major}.{found.minor}"
    )


def _driver() -> str | None:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_DRIVER_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.split()), None)


def _versions(names: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _sdpa_backends() -> list[str]:
    from torch.backends import cuda

    enabled = {
        "flash": cuda.flash_sdp_enabled(),
        "mem_efficient": cuda.mem_efficient_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled() if hasattr(cuda, "cudnn_sdp_enabled") else False,
    }
    return [name for name, on in enabled.items() if on]


def _text(record: dict[str, Any]) -> str:
    lines = []
    for key, value in record.items():
        if isinstance(value, dict):
            value = [f"{name} {version}" for name, version in value.items()]
        if isinstance(value, list):
            value = ", ".join(value) or "none"
        lines.append(f"{key.replace('_', ' ')}: {'unknown' if value is None else value}")
    return "\n".join(lines)


def _line(chosen: dict[str, Any]) -> str:
    """Return an entry of `kernels` as a line of text."""
    line = "  {operation}, {dtype} on {device}: {implementation}".format(**chosen)
    refused = "; ".join(f"{name}: {reason}" for name, reason in chosen["refused"].items())
    return f"{line} (refused {refused})" if refused else line


def main(arguments: Sequence[str]) -> int:
    """Print the record, as text or with ``--json`` as one object."""
    if list(arguments) not in ([], ["--json"]):
        print("usage: python -m spark3r.env [--json]", file=sys.stderr)
        return 2
    record, chosen = environment(), kernels()
    if arguments:
        print(json.dumps({**record, "kernels": chosen}, indent=2))
    else:
        print("\n".join((_text(record), "kernels:" if chosen else "kernels: no GPU")))
        for each in chosen:
            print(_line(each))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
