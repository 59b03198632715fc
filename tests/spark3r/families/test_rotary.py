"""Our rotary tables against a rotation that looks positions up, as upstream does."""

from __future__ import annotations

import pytest
import torch
from stand_in_parts import Rotary
from torch import Tensor, nn

from spark3r import FamilyError, TokenLayout
from spark3r.families.parts.rotary import MOST_POSITIONS, base_frequency, rotate, without_waiting
from spark3r.reduction.operators import Operators, TemporalStride, TokenStride
from spark3r.reduction.plans import select
from spark3r.reduction.rule import ResolvedRule

LAYOUT = TokenLayout(frames=5, height=2, width=3, special=2)
SPECIAL_LAST = TokenLayout(frames=5, height=2, width=3, special=2, special_last=True)


def _positions(layout: TokenLayout, uniform: bool) -> Tensor:
    rows, columns = torch.arange(layout.height) + 1, torch.arange(layout.width) + 1
    patches = torch.cartesian_prod(rows, columns)
    if uniform:
        patches = torch.ones_like(patches)
    none = patches.new_zeros(layout.special, 2)
    frame = torch.cat((patches, none) if layout.special_last else (none, patches))
    return frame.repeat(layout.frames, 1)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("layout", [LAYOUT, SPECIAL_LAST], ids=["special-first", "special-last"])
@pytest.mark.parametrize(
    "operators",
    [
        None,
        Operators(),
        Operators(key_value=TemporalStride(keep_special=True)),
        Operators(key_value=TokenStride(mass_correction=1.0)),
    ],
    ids=["all", "frames", "frames-and-specials", "tokens"],
)
def test_equals_rotation_by_positions(
    dtype: torch.dtype, uniform: bool, layout: TokenLayout, operators: Operators | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 1, 2, layout.tokens, 16, generator=generator).to(dtype)
    embedding = Rotary("base_frequency")
    positions = _positions(layout, uniform)
    selection = None
    kept = key
    if operators is not None:
        selection = select(layout, ResolvedRule(1, 2, operators), key.device)
        assert selection is not None
        kept = selection.take(key, 2)
    rows = None
    if selection is not None and selection.index is not None:
        rows = selection.index % layout.tokens_per_frame
    found = (
        rotate(query, embedding, layout, None, uniform=uniform),
        rotate(kept, embedding, layout, rows, uniform=uniform),
    )
    turned = embedding(key, positions)
    expected = turned if selection is None else selection.take(turned, 2)
    assert torch.equal(found[0], embedding(query, positions))
    assert torch.equal(found[1], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
def test_positions_looked_up_without_waiting_give_the_same_bits(
    dtype: torch.dtype, strided: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(0, 200, (3, 30, 2), generator=generator)
    shape = (3, 30, 2, 16) if strided else (3, 2, 30, 16)
    tokens = torch.randn(shape, generator=generator).to(dtype)
    tokens = tokens.transpose(1, 2) if strided else tokens
    embedding = Rotary("base")
    expected = embedding(tokens, positions)
    ((module, name, forward),) = without_waiting(nn.ModuleList([embedding, nn.Identity()]))
    assert (module, name) == (embedding, "forward")
    setattr(embedding, name, forward)
    found = embedding(tokens, positions)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    with pytest.raises(IndexError):
        embedding(tokens, positions + MOST_POSITIONS)


def test_another_embedding_is_refused() -> None:
    assert base_frequency(Rotary("base")) == 100.0
    with pytest.raises(FamilyError, match="Identity has no base frequency"):
        base_frequency(nn.Identity())
