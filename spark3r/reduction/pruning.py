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
        mass: What mass correction adds to their attention logits, ``[M]``, more than 0 for those
            that stand for dropped tokens too; None when it is off.
    """

    length: int
    frames: int
    frame_stride: int | None = None
    index: Tensor | None = None
    mass: Tensor | None = None

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return what mass correction adds to the logits of the kept keys, ``[M]``, or None."""
        return None if self.mass is None else self.mass.to(dtype)

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
    stays = frame % rule.key_value == 0
    specials = layout.special * (stays | operators.keep_special)
    if operators.key_value == "token_stride":
        patches = members(frame, layout.height, layout.width, rule.key_value)
    else:
        patches = layout.patches * stays
    if operators.keep_anchor and layout.anchor_frame is not None:
        patches[layout.anchor_frame] = layout.patches
        specials[layout.anchor_frame] = layout.special
    return int(patches.sum() + specials.sum()) + layout.tail


_Parts = tuple[int, int, int | None, Tensor | None, Tensor | None]


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
    specials = torch.zeros(layout.frames, layout.special, dtype=torch.bool, device="cpu")
    specials[:: 1 if keep_special else factor] = True
    whole = None
    if keep_anchor and layout.anchor_frame is not None:
        whole = layout.anchor_frame
        patches[whole] = specials[whole] = True
    kept = _in_sequence(layout, patches, specials, tail=True)
    length = int(kept.sum())

    mass = None
    if mass_correction > 0:
        masses = (_log_mass(patches, whole), _log_mass(specials, whole))
        if any(part.any() for part in masses):
            exact = torch.float32 if device.type == "mps" else torch.float64  # which MPS lacks
            mass = mass_correction * _in_sequence(layout, *masses, tail=0.0)[kept]
            mass = mass.to(device, exact)

    stride = torch.zeros(layout.frames, layout.tokens_per_frame, dtype=torch.bool, device="cpu")
    stride[::factor] = True
    if layout.tail == 0 and torch.equal(kept, stride.flatten()):
        return length, layout.frames, factor, None, mass
    positions = kept.nonzero().squeeze(1).to(device)
    return length, layout.frames, None, positions, mass


def _log_mass(kept: Tensor, whole: int | None) -> Tensor:
    """Return log(tokens stood for / tokens kept) of alike tokens, ``[S, T]``.

    Args:
        kept: Which of them stay, ``[S, T]`` bool.
        whole: A frame whose tokens all stay and stand for themselves alone, if any.
    """
    thinned = torch.ones_like(kept)
    if whole is not None:
        thinned[whole] = False
    remaining = int((kept & thinned).sum())
    return thinned.double() * (log(int(thinned.sum()) / remaining) if remaining else 0.0)


def _in_sequence(layout: TokenLayout, patches: Tensor, specials: Tensor, tail: float) -> Tensor:
    """Return ``[N]`` of values of patches ``[S, h*w]`` and special tokens ``[S, special]``."""
    frames = (patches, specials) if layout.special_last else (specials, patches)
    return torch.cat((torch.cat(frames, dim=1).flatten(), patches.new_full((layout.tail,), tail)))


def _kept_patches(layout: TokenLayout, factor: int, operator: KeyValueOperator) -> Tensor:
    """Return which patches the operator keeps, ``[S, h*w]`` bool on the CPU."""
    if operator == "token_stride":
        return residues(layout.frames, layout.height, layout.width, factor) == 0
    patches = torch.zeros(layout.frames, layout.patches, dtype=torch.bool, device="cpu")
    patches[::factor] = True
    return patches
