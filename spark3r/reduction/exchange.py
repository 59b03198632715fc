"""What ranks exchange outside of global attention, for parts of a model that couple frames."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .sharding import Shard, ShardedLayout


@dataclass
class Exchange:
    """What modules that couple frames need of the present pass.

    Attributes:
        layout: Token layout of the rank's frames; None if the pass is not shared.
        first_tokens: Modules with special tokens ``[1, 2, ...]`` of which index 0 is for the first
            frame of a clip and index 1 for all others, and the names of these parameters.
    """

    layout: ShardedLayout | None = None
    first_tokens: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def shard(self) -> Shard | None:
        """The rank's place among those that share the pass, None if the pass is not shared."""
        return None if self.layout is None else self.layout.shard

    def begin(self, layout: ShardedLayout) -> None:
        """Begin a shared pass. A rank without the first frame uses the tokens of the others."""
        self.layout = layout
        if layout.shard.rank > 0:
            for module, name in self.first_tokens:
                own = module._parameters[name]
                if own is not None:
                    module.__dict__[name] = own[:, 1:].expand_as(own)

    def end(self) -> None:
        """Restore the model's own special tokens. Heads may still run."""
        for module, name in self.first_tokens:
            module.__dict__.pop(name, None)

    def gather(self, frames: Tensor) -> Tensor:
        """Return a tensor ``[B, S, ...]`` of the whole clip from that of each rank's frames."""
        shard = self._needed()
        rows = shard.gather(frames.transpose(0, 1), shard.counts).wait()
        return _join(rows, shard).transpose(0, 1)

    def own(self, frames: Tensor) -> Tensor:
        """Return this rank's frames of a tensor ``[B, S, ...]`` of the whole clip."""
        return frames[:, self._needed().frames]

    def first(self, tensor: Tensor) -> Tensor:
        """Return the tensor that rank 0 has; all ranks have one of its shape."""
        shard = self._needed()
        return shard.gather(tensor[None], (1,) * len(shard.counts)).wait()[0]

    def _needed(self) -> Shard:
        assert self.layout is not None, "modules ask for the layout first"
        return self.layout.shard


def _join(rows: Tensor, shard: Shard) -> Tensor:
    """Return rows of all frames from what arrives of each rank, ``[S, ...]``."""
    counts, most = shard.counts, max(shard.counts)
    if len(set(counts)) == 1:
        return rows
    return torch.cat([rows[i * most : i * most + count] for i, count in enumerate(counts)])
