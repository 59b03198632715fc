"""Key-value pruning: the tokens that stay among the keys and values (Spark3R §IV-C)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log

import torch
from torch import Tensor

from ..kernels.grouped_attention import Group
from ..layout import TokenLayout

MOST_GROUPS = 4
"""Groups of keys with one bias. Mass correction of thinned tokens makes at most three. With many
groups a mask is faster."""


MASKED_BIAS = -6e4
"""Bias of a masked token's logit: its weight is 0 beside any other, and float16 can hold it."""


@dataclass(frozen=True, eq=False)
class KeySelection:
    """The tokens that stay among the keys and values of one layer.

    They are in sequence order, unless `by_group` has ordered them.

    Attributes:
        length: Number of kept tokens M.
        frames: Number of frames in the whole sequence.
        frame_stride: Distance between kept frames if whole frames at equal distances are kept, and
            nothing else. `take` then reads a strided view and needs no index.
        index: Positions of the kept tokens in the sequence otherwise, ``[M]`` int64.
        logit_bias: Bias of mass correction on their attention logits, ``[M]``: more than 0 for a
            token that also stands for dropped ones. None if no token does, or if it is switched
            off.
        groups: First place, length and bias of each run of kept tokens with one bias, if
            `by_group` has ordered them; else empty.
    """

    length: int
    frames: int
    frame_stride: int | None = None
    index: Tensor | None = None
    logit_bias: Tensor | None = None
    groups: tuple[Group, ...] = ()

    def by_group(self) -> KeySelection:
        """Return the selection with tokens of the same bias side by side, the least bias first.

        Kernels without a mask can then attend to one group at a time. A bias that all tokens share
        cancels in the softmax, so it is dropped. A selection without a bias, or with more than
        `MOST_GROUPS` different ones, is returned as it is.
        """
        if self.logit_bias is None:
            return self
        biases, sizes = self.logit_bias.unique(return_counts=True)
        if len(biases) == 1:
            return replace(self, logit_bias=None)
        if len(biases) > MOST_GROUPS:
            return self
        starts = (sizes.cumsum(0) - sizes).tolist()
        groups = tuple(zip(starts, sizes.tolist(), biases.tolist(), strict=True))
        ordered, order = self.logit_bias.sort(stable=True)
        if torch.equal(ordered, self.logit_bias):
            return replace(self, groups=groups)
        return KeySelection(
            self.length,
            self.frames,
            index=self.positions()[order],
            logit_bias=ordered,
            groups=groups,
        )

    def indexed(self) -> KeySelection:
        """Return the selection with an index, on the CPU."""
        return replace(self, frame_stride=None, index=self.positions())

    def of_frames(self, frames: Tensor, layout: TokenLayout) -> KeySelection:
        """Return the selection with other frames in the place of 0, 1, 2, ...

        Args:
            frames: A permutation of the frames, ``[S]`` int64 on the index's device.
            layout: Token layout of the clip.
        """
        assert self.index is not None, "made by `indexed`"
        size = layout.tokens_per_frame
        slot = (self.index // size).clamp_max(layout.frames - 1)
        moved = frames.index_select(0, slot) * size + self.index % size
        if layout.tail:
            moved = torch.where(self.index < layout.frames * size, moved, self.index)
        return replace(self, index=moved)

    def without(self, masked: Tensor) -> KeySelection:
        """Return the selection with a bias that leaves no weight to masked tokens.

        It is for selections whose tokens the host does not know, so that none can be dropped.

        Args:
            masked: Which tokens of the sequence are masked, ``[N]`` bool on the index's device.
        """
        assert self.index is not None, "made by `indexed`"
        mask = MASKED_BIAS * masked.index_select(0, self.index)
        bias = mask if self.logit_bias is None else mask + self.logit_bias.to(mask.dtype)
        return replace(self, logit_bias=bias, groups=())

    def take(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Return the kept tokens of ``[..., N, ...]`` along a ``dim`` >= 0 as ``[..., M, ...]``."""
        if self.index is not None:
            return tokens.index_select(dim, self.index)
        by_frame = tokens.unflatten(dim, (self.frames, -1))
        kept = (slice(None),) * dim + (slice(None, None, self.frame_stride),)
        return by_frame[kept].flatten(dim, dim + 1)

    def positions(self) -> Tensor:
        """Return the positions of the kept tokens in the sequence, ``[M]`` int64."""
        if self.index is not None:
            return self.index
        frames = torch.arange(self.frames, device="cpu")[:: self.frame_stride]
        tokens_per_frame = self.length // len(frames)
        inside = torch.arange(tokens_per_frame, device="cpu")
        return (frames.view(-1, 1) * tokens_per_frame + inside).flatten()


def thinned(
    layout: TokenLayout,
    factor: int,
    patches: Tensor,
    *,
    keep_special: bool,
    keep_anchor: bool,
    mass_correction: float,
) -> KeySelection:
    """Return the selection of some patches, with special tokens and tail.

    Masked patches do not stay, and nothing stands for them. If they are all that would stay, all
    others stay instead.

    It has at most three masses: one of thinned patches, one of thinned special tokens, and 0 for
    the anchor frame and the tail. The keys are in sequence order, because another order of
    summation changes the last bits of the output; `KeySelection.by_group` makes the other order.

    Args:
        layout: Token layout of the clip.
        factor: Key-value factor r. Special tokens of every r-th frame stay.
        patches: Patches that stay, ``[S, h * w]`` bool on the CPU.
        keep_special: Whether all special tokens stay.
        keep_anchor: Whether the whole anchor frame stays.
        mass_correction: Strength β of the correction, from 0 to 1.
    """
    present = present_patches(layout)
    patches = patches & present
    if not patches.any():
        patches = present.clone()
    specials = torch.zeros(layout.frames, layout.special, dtype=torch.bool, device="cpu")
    specials[:: 1 if keep_special else factor] = True
    whole = None
    if keep_anchor and layout.anchor_frame is not None:
        whole = layout.anchor_frame
        patches[whole], specials[whole] = present[whole], True
    kept = _in_sequence(layout, patches, specials, tail=True)
    length = int(kept.sum())

    bias = None
    if mass_correction > 0:
        masses = (
            _log_mass(patches, present, whole),
            _log_mass(specials, torch.ones_like(specials), whole),
        )
        if any(part.any() for part in masses):
            bias = mass_correction * _in_sequence(layout, *masses, tail=0.0)[kept]

    stride = torch.zeros(layout.frames, layout.tokens_per_frame, dtype=torch.bool, device="cpu")
    stride[::factor] = True
    if layout.tail == 0 and torch.equal(kept, stride.flatten()):
        return KeySelection(length, layout.frames, frame_stride=factor, logit_bias=bias)
    return KeySelection(length, layout.frames, index=kept.nonzero().squeeze(1), logit_bias=bias)


def thinned_length(
    layout: TokenLayout, factor: int, patches: Tensor, *, keep_special: bool, keep_anchor: bool
) -> int:
    """Return the length of `thinned` from the number of patches that stay in each frame.

    Args:
        layout: Token layout of the clip.
        factor: Key-value factor r.
        patches: Number of patches that stay by frame, ``[S]`` int64 on the CPU.
        keep_special: Whether all special tokens stay.
        keep_anchor: Whether the whole anchor frame stays.
    """
    stays = torch.arange(layout.frames, device="cpu") % factor == 0
    specials = layout.special * (stays | keep_special)
    patches = patches.clone()
    if keep_anchor and layout.anchor_frame is not None:
        patches[layout.anchor_frame] = layout.patches
        specials[layout.anchor_frame] = layout.special
    return int(patches.sum() + specials.sum()) + layout.tail


def present_patches(layout: TokenLayout) -> Tensor:
    """Return which patches are not masked, ``[S, h * w]`` bool on the CPU."""
    if layout.masked is None:
        return torch.ones(layout.frames, layout.patches, dtype=torch.bool, device="cpu")
    masked = torch.frombuffer(bytearray(layout.masked), dtype=torch.uint8)
    return masked.view(layout.frames, layout.patches) == 0


def masked_tokens(layout: TokenLayout) -> Tensor:
    """Return which tokens of the sequence are masked patches, ``[N]`` bool on the CPU."""
    special = torch.zeros(layout.frames, layout.special, dtype=torch.bool, device="cpu")
    return _in_sequence(layout, ~present_patches(layout), special, tail=False)


def _log_mass(kept: Tensor, present: Tensor, whole: int | None) -> Tensor:
    """Return log(tokens stood for / tokens kept) of tokens of one kind, ``[S, T]``.

    Args:
        kept: Tokens that stay, ``[S, T]`` bool.
        present: Tokens that may stay, ``[S, T]`` bool.
        whole: Frame whose tokens all stay and stand for themselves alone, or None.
    """
    thinned = present.clone()
    if whole is not None:
        thinned[whole] = False
    remaining = int((kept & thinned).sum())
    return thinned.double() * (log(int(thinned.sum()) / remaining) if remaining else 0.0)


def _in_sequence(layout: TokenLayout, patches: Tensor, specials: Tensor, tail: float) -> Tensor:
    """Return values of patches ``[S, h*w]`` and special tokens ``[S, special]`` as ``[N]``."""
    frames = (patches, specials) if layout.special_last else (specials, patches)
    return torch.cat((torch.cat(frames, dim=1).flatten(), patches.new_full((layout.tail,), tail)))
