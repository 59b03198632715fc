"""Clips side by side: on a CPU, several clips at once, each on one thread.

The operations of a small model are short, so that a second thread for each hardly helps. Two
clips at once are a third faster on two cores, and what a clip gives does not depend on the cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from .progress import Progress, no_progress

T = TypeVar("T")
R = TypeVar("R")

SMALL_BYTES = 200_000_000
"""Largest size of a model's parameters at which clips run side by side. A larger model keeps all
threads busy, and its activations may not fit into memory several times."""

MOST = 8
"""Most clips at once."""


def clips_at_once(model: nn.Module) -> int:
    """Return how many clips run side by side: 1 on a GPU, and for a model that is not small."""
    parameters = list(model.parameters())
    size = sum(each.numel() * each.element_size() for each in parameters)
    if size > SMALL_BYTES or any(each.device.type != "cpu" for each in parameters):
        return 1
    return threads()


def threads() -> int:
    """Return how many threads of one operation each may run side by side."""
    return min(MOST, torch.get_num_threads())


def side_by_side(
    function: Callable[[T], R],
    items: Sequence[T],
    at_once: int,
    progress: Progress = no_progress,
) -> list[R]:
    """Return a function's results for items, several of which run at once.

    Args:
        function: The function. Operations that it calls take one thread, also where only one item
            runs at once, unless ``at_once`` is 1.
        items: The items.
        at_once: Largest number of items at once; 1 calls the function here.
        progress: Callback(items done, their total).

    Raises:
        Exception: The error of the first item that failed. Items that have not begun do not run.
    """
    results: list[R] = []
    if not items:
        return results
    progress(0, len(items))
    if at_once == 1:
        for number, item in enumerate(items, start=1):
            results.append(function(item))
            progress(number, len(items))
        return results
    with _single_threaded_operations(), ThreadPoolExecutor(at_once) as pool:
        futures: list[Future[R]] = [pool.submit(function, item) for item in items]
        try:
            for number, done in enumerate(as_completed(futures), start=1):
                if done.exception() is not None:
                    break
                progress(number, len(items))
        finally:
            pool.shutdown(cancel_futures=True)
        return [each.result() for each in futures if not each.cancelled()]


@contextmanager
def _single_threaded_operations() -> Iterator[None]:
    """Give operations of threads that begin in the block one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
