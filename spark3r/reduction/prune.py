"""Key-value pruning: which tokens stay among the keys and values (Spark3R §IV-C)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import log
from operator import index
from typing import Any

import torch
from torch import Tensor

from ..layout import TokenLayout
from ..schedule import KeyValueOperator, LayerRule
from .lattice import members, residues


@dataclass(frozen=True, eq=False)
class KeySelection:
    """The tokens that stay among the keys and values of one layer, in sequence order.

    Attributes:
        length: Their number M.
        frames: Frames of the sequence they are taken from.
        frame_stride: Set when they are all tokens of every so many frames and none else: then
            `take` reads a strided view and needs no index.
        index: Otherwise their positions in the sequence, ``[M]`` int64.
        thinned: Which of them stand for dropped patches too, ``[M]`` bool, or None when mass
            correction is off.
        mass: What mass correction adds to those keys' attention logits.
    """

    length: int
    frames: int
    frame_stride: int | None = None
    index: Tensor | None = None
    thinned: Tensor | None = None
    mass: float = 0.0

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return what mass correction adds to the logits of the kept keys, ``[M]``, or None."""
        return None if self.thinned is None else self.thinned.to(dtype) * self.mass

    def take(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """Return the kept tokens of ``[..., N, ...]`` along a ``dim`` >= 0 as ``[..., M, ...]``."""
        if self.index is not None:
            return tokens.index_select(dim, self.index)
        by_frame = tokens.unflatten(dim, (self.frames, -1))
        kept = (slice(None),) * dim + (slice(None, None, self.frame_stride),)
        return by_frame[kept].flatten(dim, dim + 1)


def select(layout: TokenLayout, rule: LayerRule, device: torch.device) -> KeySelection | None:
    """Return the keys and values that stay under a resolved rule, or None when all do.

    The selection depends on nothing but its arguments and is cached, with its index on
    ``device``.

    Args:
        layout: Token layout of the pass.
        rule: A resolved rule, with its operators (see `Schedule.resolve`).
        device: Where the tokens live.
    """
    if rule.key_value == 1:
        return None
    operators = rule.operators
    assert operators is not None, "resolve the schedule first"
    chosen = (
        operators.key_value,
        operators.keep_special,
        operators.keep_anchor,
        operators.mass_correction,
    )
    # Plain values cross the border of a traced graph; an object made outside would not.
    return KeySelection(*_select(layout.fields, index(rule.key_value), chosen, device))


def key_value_length(layout: TokenLayout, rule: LayerRule) -> int:
    """Return the realised number of keys under a resolved rule, without listing them."""
    if rule.key_value == 1:
        return layout.tokens
    operators = rule.operators
    assert operators is not None, "resolve the schedule first"
    frame = torch.arange(layout.frames, device="cpu")
    specials = torch.full_like(frame, layout.special)
    if operators.key_value == "token_stride":
        patches = members(frame, layout.height, layout.width, rule.key_value)
    else:
        stays = frame % rule.key_value == 0
        patches = layout.patches * stays
        if not operators.keep_special:
            specials = layout.special * stays
    if operators.keep_anchor and layout.anchor_frame is not None:
        patches[layout.anchor_frame] = layout.patches
        specials[layout.anchor_frame] = layout.special
    return int(patches.sum() + specials.sum()) + layout.tail


_Parts = tuple[int, int, int | None, Tensor | None, Tensor | None, float]


@torch.compiler.assume_constant_result
def _select(
    layout: tuple[Any, ...], factor: int, operators: tuple[Any, ...], device: torch.device
) -> _Parts:
    return _build(layout, factor, operators, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # or a later backward pass could not use what is cached
def _build(
    fields: tuple[Any, ...], factor: int, operators: tuple[Any, ...], device: torch.device
) -> _Parts:
    layout = TokenLayout(*fields)
    operator, keep_special, keep_anchor, mass_correction = operators
    patches = _kept_patches(layout, factor, operator)  # [S, h*w]
    thinned = torch.ones(layout.frames, dtype=torch.bool, device="cpu")
    if keep_anchor and layout.anchor_frame is not None:
        thinned[layout.anchor_frame] = False
        patches[layout.anchor_frame] = True

    specials = torch.zeros(layout.frames, layout.special, dtype=torch.bool, device="cpu")
    specials[patches.all(dim=1) if operator == "temporal_stride" else slice(None)] = True
    if keep_special:
        specials[:] = True
    frames = torch.cat((patches, specials) if layout.special_last else (specials, patches), dim=1)
    kept = torch.cat((frames.flatten(), torch.ones(layout.tail, dtype=torch.bool, device="cpu")))

    stands_for_more, mass = None, 0.0
    remaining = int(patches[thinned].sum())
    if mass_correction > 0 and remaining:
        mass = mass_correction * log(int(thinned.sum()) * layout.patches / remaining)
        among = torch.zeros(layout.frames, layout.tokens_per_frame, dtype=torch.bool, device="cpu")
        among[:, layout.patch_start : layout.patch_start + layout.patches] = thinned.view(-1, 1)
        among = torch.cat(
            (among.flatten(), torch.zeros(layout.tail, dtype=torch.bool, device="cpu"))
        )
        stands_for_more = among[kept].to(device)

    length = int(kept.sum())
    stride = torch.zeros(layout.frames, layout.tokens_per_frame, dtype=torch.bool, device="cpu")
    stride[::factor] = True
    if layout.tail == 0 and torch.equal(kept, stride.flatten()):
        return length, layout.frames, factor, None, stands_for_more, mass
    positions = kept.nonzero().squeeze(1).to(device)
    return length, layout.frames, None, positions, stands_for_more, mass


def _kept_patches(layout: TokenLayout, factor: int, operator: KeyValueOperator) -> Tensor:
    """Return which patches the operator keeps, ``[S, h*w]`` bool on the CPU."""
    if operator == "token_stride":
        return residues(layout.frames, layout.height, layout.width, factor) == 0
    patches = torch.zeros(layout.frames, layout.patches, dtype=torch.bool, device="cpu")
    patches[::factor] = True
    return patches
