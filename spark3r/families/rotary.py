"""Rotary position embedding of reduced attention: tables made once per grid, no synchronisation.

VGGT, π³ and Depth-Anything-3 rotate the first half of a head by a token's row and the second half
by its column, and look the largest position up on the host twice per block. Positions follow from
the token layout, so one table per frame does for all frames and layers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from ..errors import FamilyError
from ..layout import TokenLayout
from ..reduction import KeySelection
from ..reference.rope import Rope, apply_rope


def rotate(
    query: Tensor,
    key: Tensor,
    embedding: nn.Module,
    layout: TokenLayout,
    selection: KeySelection | None,
    *,
    uniform: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate the queries of all tokens and the keys of the selected ones.

    Args:
        query: ``[B, H, N, D]``, after query norm.
        key: ``[B, H, M, D]``, after key norm.
        embedding: The model's own embedding, of which the base frequency is taken.
        layout: Token layout of the N tokens, without tail.
        selection: Which tokens the keys are of, None for all.
        uniform: Whether all patches share position (1, 1) instead of (row + 1, column + 1).

    Returns:
        Rotated queries and keys, as given. The arithmetic is upstream's, to the last bit.

    Raises:
        FamilyError: If the embedding has no base frequency.
    """
    special_last = layout.special_last
    grid = (layout.special, layout.height, layout.width, special_last, uniform)
    cos, sin = _tables(grid, query.shape[-1], base_frequency(embedding), query.dtype, query.device)
    query = _rotate_frames(query, (cos, sin))
    if selection is None or selection.index is None:
        return query, _rotate_frames(key, (cos, sin))
    place = selection.index % layout.tokens_per_frame
    return query, apply_rope(key, (cos.index_select(0, place), sin.index_select(0, place)))


def base_frequency(embedding: nn.Module) -> float:
    """Return the base frequency of upstream's two-dimensional rotary embedding.

    Raises:
        FamilyError: If it is another kind of embedding.
    """
    for name in ("base_frequency", "base"):  # VGGT and Depth-Anything-3, π³
        value = getattr(embedding, name, None)
        if isinstance(value, int | float):
            return float(value)
    raise FamilyError(
        f"the model's rotary embedding {type(embedding).__name__} has no base frequency: it is "
        "not the two-dimensional one that this family uses"
    )


def _rotate_frames(tokens: Tensor, rope: Rope) -> Tensor:
    """Rotate whole frames ``[B, H, S * P, D]`` with the tables ``[P, D]`` of one."""
    return apply_rope(tokens.unflatten(2, (-1, rope[0].shape[0])), rope).flatten(2, 3)


@torch.compiler.assume_constant_result
def _tables(
    grid: tuple[int, int, int, bool, bool],
    head_dim: int,
    frequency: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Rope:
    return _build(grid, head_dim, frequency, dtype, device)


@lru_cache(maxsize=64)
def _build(
    grid: tuple[int, int, int, bool, bool],
    head_dim: int,
    frequency: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Rope:
    special, height, width, special_last, uniform = grid
    # A table first made under inference_mode must still serve a backward pass later.
    with torch.inference_mode(False), torch.no_grad():
        half = head_dim // 2
        exponent = torch.arange(0, half, 2, device=device).float() / half
        inverse = 1.0 / frequency**exponent
        patch = torch.ones(height, width, 2, device=device)
        if not uniform:
            patch[..., 0] += torch.arange(height, device=device).view(-1, 1)
            patch[..., 1] += torch.arange(width, device=device)
        patch = patch.flatten(0, 1)
        none = patch.new_zeros(special, 2)
        position = torch.cat((patch, none) if special_last else (none, patch))
        # Upstream rounds the angles, not only their sines, to the tokens' precision.
        angle = (position[:, :, None] * inverse).to(dtype)  # [P, 2, D/4]
        angle = torch.cat((angle, angle), dim=2).flatten(1)  # [P, D]: y y | x x
        return angle.cos(), angle.sin()
