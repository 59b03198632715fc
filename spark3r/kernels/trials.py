"""The choice between a fused kernel and the plain implementation of an operation.

Fused kernels depend on the device, its driver and the version of torch, and some of them are
private to torch. So none is trusted unseen. At the first use on a device and in a precision, each
candidate runs on a small input, in order of preference, and is compared with the plain
implementation. The first one that runs and agrees is used from then on. If none does, the plain
implementation is. `choices` tells what was chosen, and why the others were refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import first_line

Trial = Callable[[str, torch.device, torch.dtype, int], str | None]
"""Function of a candidate, a device, a precision and a head size D. It runs the candidate on a
small input and returns in which way its result is wrong, or None. It may raise anything."""


@dataclass(frozen=True)
class Choice:
    """The implementation of an operation on one device and in one precision.

    Attributes:
        operation: What is computed, such as ``matching``.
        device: Device, such as ``cuda:0``.
        dtype: Precision, such as ``bfloat16``.
        head_dim: Size of one attention head, D.
        implementation: Candidate that is used, or the plain implementation.
        refused: Candidates that were tried before and refused, each with the reason.
    """

    operation: str
    device: str
    dtype: str
    head_dim: int
    implementation: str
    refused: tuple[tuple[str, str], ...] = ()


_Key = tuple[str, str, torch.dtype, int, tuple[str, ...]]

_choices: dict[_Key, Choice] = {}
_forced: dict[str, str] = {}
_lock = threading.RLock()


def choices() -> tuple[Choice, ...]:
    """Return all choices of this process so far, in the order in which they were made."""
    with _lock:
        return tuple(_choices.values())


def choices_for(device: torch.device, dtype: torch.dtype) -> tuple[Choice, ...]:
    """Return one choice per operation that passes on a device have made.

    Args:
        device: Device of the passes.
        dtype: Precision of the passes. An operation that always runs in another one is there too.
    """
    own = [choice for choice in choices() if choice.device == str(device)]
    name = str(dtype).removeprefix("torch.")
    return tuple(
        {each.operation: each for each in sorted(own, key=lambda c: c.dtype == name)}.values()
    )


@contextmanager
def forced(operation: str, implementation: str) -> Iterator[None]:
    """Use one implementation of an operation, untried, on every device inside the block.

    For tests and benchmarks. A graph that was compiled outside the block keeps its own choice.
    """
    before = dict(_forced)
    _forced[operation] = implementation
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def is_possible(operation: str, device: torch.device) -> bool:
    """Return False if the plain implementation is certain on a device, so that nothing is tried."""
    return device.type == "cuda" or operation in _forced


def choose(
    operation: str,
    candidates: Sequence[str],
    plain: str,
    trial: Trial,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> str:
    """Return the implementation to use.

    Args:
        operation: What is computed.
        candidates: Names of fused implementations, the preferred one first.
        plain: Name of the plain implementation.
        trial: Trial of a candidate.
        device: Device of the tensors.
        dtype: Precision of the tensors.
        head_dim: Size of one attention head, D.
    """
    if operation in _forced:
        return _forced[operation]
    if not candidates:
        return plain
    key = (operation, str(device), dtype, head_dim, tuple(candidates))
    with _lock:
        if key not in _choices:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return plain  # a trial waits for the device, which would break the capture
            _choices[key] = _tried(operation, candidates, plain, trial, device, dtype, head_dim)
        return _choices[key].implementation


def _tried(
    operation: str,
    candidates: Sequence[str],
    plain: str,
    trial: Trial,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> Choice:
    refused: list[tuple[str, str]] = []
    implementation = plain
    for candidate in candidates:
        try:
            with _undisturbed(device):
                reason = trial(candidate, device, dtype, head_dim)
        except Exception as error:  # whatever a kernel, a compiler or a driver raises
            reason = f"it raised {type(error).__name__}: {first_line(error)}"
        if reason is None:
            implementation = candidate
            break
        refused.append((candidate, reason))
    name = str(dtype).removeprefix("torch.")
    return Choice(operation, str(device), name, head_dim, implementation, tuple(refused))


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Run a trial on real tensors and in full precision, whatever surrounds the call."""
    on_cuda = device.type == "cuda" and torch.cuda.is_available()
    waits = torch.cuda.get_sync_debug_mode() if on_cuda else 0
    autocast = torch.autocast(device.type, enabled=False)
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad(), autocast:
        try:
            if waits:
                torch.cuda.set_sync_debug_mode(0)  # a trial waits for its result, on purpose
            yield
        finally:
            if waits:
                torch.cuda.set_sync_debug_mode(waits)


def disagreement(found: Tensor, exact: Tensor, eps: float) -> str | None:
    """Return in which way a result is wrong by more than rounding, or None if it is right.

    Args:
        found: Result of a candidate, of any precision.
        exact: Result of the plain implementation in float64, on the CPU.
        eps: Distance between 1 and the next number of the result's precision.
    """
    if found.shape != exact.shape:
        return f"its result has the shape {list(found.shape)}, expected {list(exact.shape)}"
    wrong = found.to("cpu", torch.float64) - exact
    # Half precision rounds the result and little else. In float32 every step rounds alike. A kernel
    # that is wrong is wrong by far more than either.
    most, typical = (4, 1) if eps > 1e-6 else (32, 8)
    for name, size, roundings in (
        ("most", _largest, most),
        ("root mean square", _typical, typical),
    ):
        allowed = roundings * eps * size(exact)
        if not size(wrong) <= allowed:  # NaN is not
            return (
                f"it differs from the plain result by {size(wrong):.2g} ({name}), "
                f"allowed {allowed:.2g}"
            )
    return None


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _typical(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
