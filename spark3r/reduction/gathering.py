"""Keys and values on their way to attention: a rank's own ones, or those of all ranks."""

from __future__ import annotations

from functools import lru_cache
from operator import index
from typing import Any

import torch
from torch import Tensor

from ..layout import TokenLayout
from .plans import select
from .pruning import KeySelection
from .rule import ResolvedRule
from .sharding import Gathering, Shard, ShardedLayout


class Keys:
    """Keys and values that are there, or that come from all ranks while queries are made.

    Args:
        key: Keys of the kept tokens of this rank, ``[B, H, M, D]``, after their norm and rotation.
        value: Their values, ``[B, H, M, D]``, in the same precision.
        layout: Token layout of the pass.
        rule: Rule of the layer.
        selection: Selection of the kept tokens of this rank, None if all are kept.

    Attributes:
        like: Values of this rank, for their shape, precision and device.
        selection: Selection of the kept tokens in the whole clip, None if all are kept.
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        rule: ResolvedRule,
        selection: KeySelection | None,
    ) -> None:
        self._key, self.like, self.selection = key, value, selection
        self._coming: Gathering | None = None
        if isinstance(layout, ShardedLayout):
            shard = layout.shard
            self.selection = select(shard.whole, rule, key.device)
            counts, self._order = _arrangement(shard, rule, key.device)
            # Tokens come first, so that what arrives stands in sequence order.
            side_by_side = torch.stack((key, value)).permute(3, 0, 1, 2, 4)
            self._coming = shard.gather(side_by_side, counts)

    def take(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of all ranks as soon as they are there, ``[B, H, M, D]`` each."""
        if self._coming is None:
            return self._key, self.like
        rows = self._coming.wait()
        if self._order is not None:
            rows = rows.index_select(0, self._order)
        key, value = rows.permute(1, 2, 3, 0, 4)
        return key, value


def kept_counts(shard: Shard, rule: ResolvedRule) -> tuple[int, ...]:
    """Return how many tokens of each rank stay among the keys and values."""
    if rule.key_value == 1:
        return tuple(count * shard.whole.tokens_per_frame for count in shard.counts)
    return _arrangement(shard, rule, torch.device("cpu"))[0]


def received_bytes(shard: Shard, rule: ResolvedRule, width: int, itemsize: int) -> int:
    """Return the bytes of keys and values that a rank receives in a layer, for one clip.

    Each rank sends as many to every other one as the rank with the most kept tokens has.

    Args:
        shard: A rank's place among those that share the pass.
        rule: Rule of the layer.
        width: Width of the layer, the numbers in the keys of a token over all heads.
        itemsize: Bytes of a number.
    """
    counts = kept_counts(shard, rule)
    return (len(counts) - 1) * max(counts) * 2 * width * itemsize


def arrange(shard: Shard, selection: KeySelection | None) -> tuple[tuple[int, ...], Tensor | None]:
    """Return the kept tokens of each rank, and where those of the clip are among what arrives.

    Args:
        shard: The rank's place among those that share the pass.
        selection: Selection of the kept tokens in the whole clip, None if all are kept.

    Returns:
        Numbers of tokens, and places ``[M]`` int64 on the CPU. The places are None if what arrives
        is in order already.
    """
    whole = shard.whole
    positions = torch.arange(whole.tokens, device="cpu")
    if selection is not None:
        positions = selection.positions().cpu()
    firsts = whole.tokens_per_frame * torch.tensor(shard.starts, device="cpu")
    owner = torch.searchsorted(firsts, positions, right=True) - 1
    counts = torch.bincount(owner, minlength=len(shard.counts))
    in_sequence = positions.argsort().argsort()  # the order in which a rank sends its own
    place = owner * counts.max() + in_sequence - (counts.cumsum(0) - counts)[owner]
    ordered = torch.equal(place, torch.arange(int(counts.max()) * len(counts), device="cpu"))
    return tuple(counts.tolist()), None if ordered else place


def _arrangement(
    shard: Shard, rule: ResolvedRule, device: torch.device
) -> tuple[tuple[int, ...], Tensor | None]:
    kept = ResolvedRule(1, index(rule.key_value), rule.operators)
    return _build_arrangement(shard.whole.fields, shard.starts, kept, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _build_arrangement(
    layout: tuple[Any, ...], starts: tuple[int, ...], rule: ResolvedRule, device: torch.device
) -> tuple[tuple[int, ...], Tensor | None]:
    whole = TokenLayout(*layout)
    counts, order = arrange(Shard(whole, starts, 0, None), select(whole, rule, device))
    return counts, None if order is None else order.to(device)
