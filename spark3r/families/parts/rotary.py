"""Rotary position embedding with tables that are made once, so that no pass waits for the device.

VGGT, π³ and Depth-Anything-3 rotate the first half of a head by a token's row and the second half
by its column. To find the size of its table, upstream reads the largest position on the host, twice
per block: the host waits for the device, and a compiled graph breaks. In reduced layers the
positions follow from the token layout, and one table per frame is enough (`rotate`). All other
blocks keep upstream's positions and look them up in a table that is long enough for any image
(`without_waiting`). Both give the same bits as upstream.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...compiling import assume_constant_result
from ...errors import FamilyError
from ...layout import TokenLayout
from ...rope import Rope, apply_rope
from ..base import Replacement, overridden
from .recognition import arguments

MOST_POSITIONS = 4096
"""Rows or columns of patches that no image exceeds: 57,344 pixels with patches of 14."""

_CACHES = ("frequency_cache", "cache")  # VGGT and Depth-Anything-3, π³


def rotate(
    tokens: Tensor,
    embedding: nn.Module,
    layout: TokenLayout,
    rows: Tensor | None,
    *,
    uniform: bool = False,
) -> Tensor:
    """Rotate queries or keys by their positions.

    Args:
        tokens: Queries or keys ``[B, H, n, D]``, after their norm.
        embedding: The model's own embedding, which has the base frequency.
        layout: Token layout of the clip, without tail.
        rows: Place of each token inside its frame, ``[n]`` int64; None if they are whole frames.
        uniform: Whether all patches have position (1, 1) instead of (row + 1, column + 1).

    Returns:
        Rotated tokens of the same shape, equal to upstream's to the last bit.

    Raises:
        FamilyError: If the embedding has no base frequency.
    """
    cos, sin = frame_tables(tokens, embedding, layout, tokens.dtype, uniform=uniform)
    if rows is None:
        return _rotate_frames(tokens, (cos, sin))
    return apply_rope(tokens, (cos.index_select(0, rows), sin.index_select(0, rows)))


def frame_tables(
    query: Tensor,
    embedding: nn.Module,
    layout: TokenLayout,
    dtype: torch.dtype,
    *,
    uniform: bool = False,
) -> Rope:
    """Return cosines and sines of the tokens of one frame, ``[P, D]`` each.

    Args:
        query: Queries ``[..., D]``, of which device and head size count.
        embedding: The model's own embedding, which has the base frequency.
        layout: Token layout of the clip.
        dtype: Precision in which tokens are rotated. Upstream rounds the angles to it.
        uniform: Whether all patches have the same position; see `rotate`.
    """
    grid = (layout.special, layout.height, layout.width, layout.special_last, uniform)
    return _tables(grid, query.shape[-1], base_frequency(embedding), dtype, query.device)


def without_waiting(root: nn.Module) -> Iterator[Replacement]:
    """Yield the replacements that keep a model's rotary embeddings from waiting for the device.

    They replace upstream's plain implementation, which all blocks share. A compiled one (π³'s
    cuRoPE2D) does not wait, and an instance with a forward of its own is left alone.
    """
    for module in root.modules():
        if _is_plain(module):
            yield module, "forward", partial(_look_up, module)


def _is_plain(module: nn.Module) -> bool:
    return (
        any(hasattr(module, name) for name in _CACHES)
        and arguments(module) == ("tokens", "positions")
        and not overridden(module)
    )


def _look_up(self: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
    """Rotate ``[B, H, N, D]`` by integer positions ``[B, N, 2]``, row and column.

    It replaces the forward of upstream's embedding.
    """
    half = tokens.shape[-1] // 2
    cos, sin = _all_positions(half, base_frequency(self), tokens.dtype, tokens.device)
    rope = tuple(F.embedding(positions, table).flatten(2)[:, None] for table in (cos, sin))
    return apply_rope(tokens, (rope[0], rope[1]))


def base_frequency(embedding: nn.Module) -> float:
    """Return the base frequency of upstream's two-dimensional rotary embedding.

    Raises:
        FamilyError: If the embedding is of another kind.
    """
    for name in ("base_frequency", "base"):  # VGGT and Depth-Anything-3, π³
        value = getattr(embedding, name, None)
        if isinstance(value, (int, float)):  # Dynamo of torch 2.8 cannot trace int | float
            return float(value)
    raise FamilyError(
        f"the model's rotary embedding {type(embedding).__name__} has no base frequency: it is "
        "not the two-dimensional one that this family uses"
    )


def _rotate_frames(tokens: Tensor, rope: Rope) -> Tensor:
    """Rotate whole frames ``[B, H, S * P, D]`` with the tables ``[P, D]`` of one."""
    return apply_rope(tokens.unflatten(2, (-1, rope[0].shape[0])), rope).flatten(2, 3)


@assume_constant_result
def _all_positions(half: int, frequency: float, dtype: torch.dtype, device: torch.device) -> Rope:
    return _build_all_positions(half, frequency, dtype, device)


@lru_cache(maxsize=16)
def _build_all_positions(
    half: int, frequency: float, dtype: torch.dtype, device: torch.device
) -> Rope:
    """Return cosines and sines ``[MOST_POSITIONS, D / 2]`` of one axis."""
    with torch.inference_mode(False), torch.no_grad():
        position = torch.arange(MOST_POSITIONS, device=device).float()
        angle = (position[:, None] * _inverse_frequencies(half, frequency, device)).to(dtype)
        angle = torch.cat((angle, angle), dim=1)
        return angle.cos(), angle.sin()


@assume_constant_result
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
    # A table that is made under inference_mode must also serve a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        inverse = _inverse_frequencies(head_dim // 2, frequency, device)
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


def _inverse_frequencies(half: int, frequency: float, device: torch.device) -> Tensor:
    exponent = torch.arange(0, half, 2, device=device).float() / half
    return 1.0 / frequency**exponent
