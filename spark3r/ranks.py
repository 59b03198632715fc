"""Ranks: processes that share one clip, or the passes of one calibration."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .errors import Spark3rError, first_line

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

LOST = "another rank ended before the pass did, and torchrun's report names it"
_WAIT = timedelta(days=1)
"""Time that a rank waits for another, which may be reading a long video."""
_TOLD = "spark3r/told"


class RankError(Spark3rError):
    """Another rank ended, or is lost."""


def of_environment() -> tuple[int, int]:
    """Return the rank and the number of ranks that ``torchrun`` names, rank 0 of 1 without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextmanager
def loss_told(message: str) -> Iterator[None]:
    """Raise errors of the connection as a `RankError`, with their reason after the message."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise RankError(f"{message} ({first_line(error)})") from error


def all_gather(received: Tensor, sent: Tensor, group: ProcessGroup | None) -> Any:
    """Begin to gather equal tensors of all ranks side by side, and return the work to wait for.

    Bytes are sent, because some backends know few types of numbers.

    Args:
        received: Contiguous tensor ``[ranks * n, ...]`` to write to.
        sent: Contiguous tensor ``[n, ...]`` of this rank.
        group: Process group of the ranks.
    """
    import torch
    import torch.distributed as dist

    # torch 2.13 has given the function another name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(received.view(torch.uint8), sent.view(torch.uint8), group, async_op=True)


@dataclass(frozen=True)
class Joined:
    """This process among the ranks that ``torchrun`` started. By default it is alone.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        group: Process group of all ranks; None if this process is alone.
        claims_failure: Function that returns True in the first rank that asks, which then tells of
            a failure. The others are silent.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    claims_failure: Callable[[], bool] = lambda: True

    @property
    def is_first(self) -> bool:
        """Whether this process reads and writes files, and speaks."""
        return self.rank == 0

    def deal(self, images: Tensor | None, starts: Callable[[int], Sequence[int]]) -> Tensor:
        """Return this rank's frames of the images ``[S, 3, H, W]`` that rank 0 has.

        Args:
            images: Images of the whole clip on the CPU; None in other ranks.
            starts: Function from the number of frames to the first frame of each rank, and the
                number of frames at the end. Rank 0 calls it.

        Raises:
            RankError: If another rank ended.
        """
        if self.group is None and images is not None:
            return images
        import torch
        import torch.distributed as dist

        shares = [] if images is None else starts(len(images))
        with loss_told(LOST):
            told = [(shares, None if images is None else images.shape[1:])]
            dist.broadcast_object_list(told, src=0)
            shares, shape = told[0]
            own = slice(shares[self.rank], shares[self.rank + 1])
            if images is None:
                part = torch.empty(own.stop - own.start, *shape or ())
                dist.recv(part, src=0)
                return part
            for rank in range(1, self.size):
                dist.send(images[shares[rank] : shares[rank + 1]].contiguous(), dst=rank)
            return images[own]


def collect(parts: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Return, in rank 0, tensors ``[S, ...]`` of a whole clip; in other ranks their own parts.

    Args:
        parts: Tensors of this rank's frames on the CPU, ``[s, ...]``.
        group: Process group of all ranks, which has a backend for the CPU.

    Raises:
        RankError: If another rank ended.
    """
    import torch.distributed as dist

    with loss_told(LOST):
        counts: list[int] = [0] * group.size()
        dist.all_gather_object(counts, len(parts[0]), group=group)
        if group.rank() > 0:
            for part in parts:
                dist.send(part.contiguous(), dst=0, group=group)
            return list(parts)
        found = []
        for part in parts:
            whole = part.new_empty((sum(counts), *part.shape[1:]))
            pieces = whole.split(counts)
            pieces[0].copy_(part)
            for rank in range(1, group.size()):
                dist.recv(pieces[rank], src=rank, group=group)
            found.append(whole)
        return found


@contextmanager
def joined(device: str | None = None) -> Iterator[Joined]:
    """Connect the ranks that ``torchrun`` started for the block; without it do nothing.

    Args:
        device: Device of the model, as the user gave it; None for CUDA where there is one.

    Raises:
        RankError: If the ranks do not find one another.
    """
    rank, size = of_environment()
    if size == 1:
        yield Joined()
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    on_cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(device_of_rank(device or "cuda"))
    with loss_told("the ranks do not find one another"):
        store, _, _ = next(rendezvous("env://", timeout=_WAIT))
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_WAIT)

    def claims() -> bool:
        try:
            return bool(store.add(_TOLD, 1) == 1)
        except RuntimeError:  # the store has ended with its process
            return rank == 0

    yield Joined(rank, size, dist.group.WORLD, claims)
    dist.destroy_process_group()


def device_of_rank(device: str) -> str:
    """Return the device of this process: each rank of a node has a GPU of its own."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device
