"""Depth-Anything-3's reference view in slot 0, where several ranks share a clip.

Slot 0 has the reference view, and the frames before it follow one slot later. So a rank gets the
last frame of the rank before it, and rank 0 the reference view. All ranks send and receive two
frames, and one on the way back, whichever the reference view is, so nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...reduction.sharding import Shard


@dataclass(frozen=True, eq=False)
class Slots:
    """The order of frames with the reference view first.

    Attributes:
        shard: The rank's place among those that share the pass.
        reference: Number of the reference view in each clip, ``[B]`` int64.
    """

    shard: Shard
    reference: Tensor

    def reorder(self, frames: Tensor) -> Tensor:
        """Return tokens ``[B, S, P, C]`` of this rank's slots from those of its frames."""
        start, ranks = self.shard.frames.start, len(self.shard.counts)
        inside = (self.reference - start).clamp(0, frames.shape[1] - 1)
        sent = torch.stack((frames[:, -1], frames[self._clips, inside]), dim=1)
        pool = torch.cat((frames, self._of_all(sent)), dim=1)  # own, then two of each rank
        slot = self._own(frames)
        reference = self.reference[:, None]
        starts = torch.tensor(self.shard.starts, device=frames.device)
        holder = torch.searchsorted(starts, reference, right=True) - 1
        before = slot - 1 - start  # of the frame that stands in a slot up to the reference
        of_previous = frames.shape[1] + 2 * ((self.shard.rank - 1) % ranks)
        taken = torch.where(before < 0, of_previous, before)
        taken = torch.where(slot > reference, slot - start, taken)
        taken = torch.where(slot == 0, frames.shape[1] + 2 * holder + 1, taken)
        return pool[self._clips[:, None], taken]

    def restore(self, slots: Tensor) -> Tensor:
        """Return tokens ``[B, S, P, C]`` of this rank's frames from those of its slots."""
        start, count, ranks = self.shard.frames.start, slots.shape[1], len(self.shard.counts)
        pool = torch.cat((slots, self._of_all(slots[:, :1])), dim=1)  # own, then one of each rank
        frame = self._own(slots)
        reference = self.reference[:, None]
        after = frame + 1 - start
        of_next = count + (self.shard.rank + 1) % ranks
        taken = torch.where(after < count, after, of_next)
        taken = torch.where(frame > reference, frame - start, taken)
        taken = torch.where(frame == reference, count, taken)
        return pool[self._clips[:, None], taken]

    @property
    def _clips(self) -> Tensor:
        return torch.arange(len(self.reference), device=self.reference.device)

    def _own(self, frames: Tensor) -> Tensor:
        own = self.shard.frames
        return torch.arange(own.start, own.stop, device=frames.device)[None]

    def _of_all(self, frames: Tensor) -> Tensor:
        """Return equally many frames ``[B, n, P, C]`` of each rank side by side."""
        counts = (frames.shape[1],) * len(self.shard.counts)
        return self.shard.gather(frames.transpose(0, 1), counts).wait().transpose(0, 1)
