"""Masks: no query attends to a masked patch, in dense layers and in reduced ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import stand_ins
import torch
import torch.nn.functional as F
from family_cases import CASES, Case, build, difference, images, run
from hypothesis import given, settings
from hypothesis import strategies as st
from qkv import hidden, random_qkv
from small_models import make_images, make_model
from strategies import key_value_prunings, layouts
from tiers import examples
from torch import Tensor, nn

import spark3r
from spark3r import (
    DiverseFrames,
    LayoutError,
    Operators,
    PatchError,
    Schedule,
    TokenLayout,
    TokenStride,
)
from spark3r.patching import replace_attention
from spark3r.patching.handle import masked_layout
from spark3r.reduction.plans import key_value_length, select
from spark3r.reduction.pruning import MASKED_BIAS
from spark3r.reduction.rule import ResolvedRule, clamp
from spark3r.runner import Runner
from spark3r.sdpa import ReplaceSDPA

Stays = Callable[[int, str], bool]


def call(case: Case) -> dict[str, Any]:
    return {"ref_view_strategy": "first"} if case.family == "da3" else {}


def random_mask(clip: Tensor, seed: int = 3) -> Tensor:
    """Return a mask of whole patches of 14 and 16 pixels alike: blocks of half a frame's width."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = clip.shape[1], clip.shape[3], clip.shape[4]
    blocks = torch.rand(frames, 2, 3, generator=generator) < 0.6
    blocks[0, 0, 0] = True
    return blocks.repeat_interleave(height // 2, 1).repeat_interleave(width // 3, 2)


def with_a_boolean_mask(case: Case, clip: Tensor, mask: Tensor, stays: Stays) -> dict[str, Tensor]:
    """Run the model's own code, with a boolean mask on the keys of its global layers."""
    model = build(case)

    def forward(attn: nn.Module, layout: TokenLayout, *args: Any, **kwargs: Any) -> Tensor:
        allowed = torch.zeros(layout.tokens, dtype=torch.bool)
        allowed[layout.frames * layout.tokens_per_frame :] = True  # tokens of the whole clip
        for frame in range(layout.frames):
            first = frame * layout.tokens_per_frame
            first += layout.height * layout.width if layout.special_last else 0
            for token in range(layout.special):
                allowed[first + token] = stays(frame, "special")
            for y in range(layout.height):
                for x in range(layout.width):
                    seen = mask[frame, y * case.patch_size + 3, x * case.patch_size + 3]
                    allowed[oracle.token_of(layout, frame, y, x)] = seen and stays(frame, "patch")

        def masked(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[None])

        with ReplaceSDPA(masked):
            return type(attn).forward(attn, *args, **kwargs)

    with replace_attention(Runner.of(model), forward):
        return run(model, clip, **call(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense_and_reduced_layers_attend_as_under_a_boolean_mask(case: Case) -> None:
    model, clip = build(case), images(case, 6)
    mask = random_mask(clip)
    layers = case.layers
    dense = run(model, clip, **call(case))
    for schedule, stays in (
        (Schedule.dense(layers), lambda frame, kind: True),
        (Schedule.uniform(layers, key_value=3), lambda frame, kind: frame % 3 == 0),
    ):
        expected = with_a_boolean_mask(case, clip, mask, stays)
        with spark3r.apply(model, schedule) as handle:
            with handle.masking(mask):
                found = run(model, clip, **call(case))
            assert difference(found, expected) < 2e-5
            unmasked = run(model, clip, **call(case))
            assert difference(unmasked, expected) > 1e-4
    assert difference(run(model, clip, **call(case)), dense) == 0.0
    assert not [name for name in model.__dict__ if name.startswith("_spark3r")]


@settings(max_examples=examples(60), deadline=None)
@given(layouts(12), key_value_prunings(), st.integers(1, 9), st.integers(0, 100))
def test_masked_patches_are_never_selected(
    layout: TokenLayout, pruning: Any, factor: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.rand(layout.frames, layout.height, layout.width, generator=generator) < 0.5
    left[-1, -1, -1] = True
    masked = masked_layout(layout, left)
    rule = clamp(ResolvedRule(1, factor, Operators(key_value=pruning)), masked)
    selection = select(masked, rule, torch.device("cpu"), tokens=hidden(random_qkv(layout)[1]))
    assert selection is not None
    hidden_tokens = {
        oracle.token_of(layout, frame, y, x) for frame, y, x in (~left).nonzero().tolist()
    }
    kept = selection.take(torch.arange(layout.tokens).view(1, -1, 1)).flatten().tolist()
    assert len(set(kept)) == len(kept) == selection.length == key_value_length(masked, rule)
    if rule.key_value > 1 and pruning.by_content:
        assert selection.logit_bias is not None
        out = {
            token
            for token, bias in zip(kept, selection.logit_bias, strict=True)
            if bias <= MASKED_BIAS / 2
        }
        assert out == hidden_tokens & set(kept)
        return
    assert not hidden_tokens & set(kept)
    assert len(kept) > layout.tail
    if rule.key_value == 1:
        assert len(kept) == layout.tokens - len(hidden_tokens)


def test_a_mask_and_mass_correction() -> None:
    layout = TokenLayout(4, 2, 2, special=1, anchor_frame=0)
    left = torch.ones(4, 2, 2, dtype=torch.bool)
    left[1:3] = False
    operators = Operators(key_value=TokenStride(keep_special=True, mass_correction=1.0))
    selection = select(
        masked_layout(layout, left), ResolvedRule(1, 2, operators), torch.device("cpu")
    )
    assert selection is not None
    assert selection.logit_bias is not None
    # Eight patches are left, and four of them stand for all.
    assert selection.logit_bias.exp().round(decimals=6).tolist() == [1, 2, 2, 1, 1, 1, 2, 2]


def test_a_patch_is_masked_if_half_of_it_is() -> None:
    left = torch.ones(1, 8, 16, dtype=torch.bool)
    left[0, :4, :8] = False  # half of the first patch
    left[0, :3, 8:] = False  # less of the second
    assert masked_layout(TokenLayout(1, 1, 2), left).masked == b"\x01\x00"


def test_what_does_not_fit_is_refused_and_the_model_left_as_it_was() -> None:
    model, clip = make_model(), make_images(3)
    height, width = clip.shape[-2:]
    full = torch.ones(3, height, width, dtype=torch.bool)
    thin = torch.zeros_like(full)
    thin[:, 0, 0] = True
    with torch.no_grad():
        dense = model(clip)["depth"]
    with spark3r.apply(model, Schedule.dense(2)) as handle:
        for mask, message in (
            (full.float(), r"float32 of shape .* expected bool \[S, H, W\]"),
            (full[0], "expected bool"),
            (~full, "leaves no pixel: False is masked"),
            (thin, "leaves no patch"),
            (full[:2], f"2 frames of {height}x{width} pixels, which does not fit a pass of 3"),
            (full[:, :-1], "does not fit a pass"),
        ):
            with pytest.raises(LayoutError, match=message), handle.masking(mask), torch.no_grad():
                model(clip)
        with torch.no_grad():
            assert torch.equal(model(clip)["depth"], dense)
        copied = copy.deepcopy(model)
        assert not [name for name in copied.__dict__ if name == "_spark3r_masked"]
    with pytest.raises(PatchError, match="was removed"), handle.masking(full):
        pass
    model.get_submodule("aggregator.global_blocks.0.attn").forward = lambda *a, **k: None
    with (
        spark3r.apply(model, Schedule.dense(2)) as handle,
        pytest.raises(PatchError, match="has a forward of its own"),
        handle.masking(full),
    ):
        pass


def test_frames_in_another_order_are_refused() -> None:
    model, clip = stand_ins.Da3().eval(), torch.rand(1, 4, 3, 28, 28)
    mask = torch.ones(4, 28, 28, dtype=torch.bool)
    mask[1] = False
    with spark3r.apply(model, Schedule.dense(3)) as handle, handle.masking(mask), torch.no_grad():
        with pytest.raises(LayoutError, match='pass ref_view_strategy="first"'):
            model(clip)
        model(clip, ref_view_strategy="first")
        model(clip, torch.rand(1, 4, 4, 4))  # given cameras keep the order
        Runner.of(model).run(clip[0])  # which asks for it


def test_diverse_frames_under_a_mask_give_finite_outputs_in_half_precision() -> None:
    model, clip = make_model(), make_images(6)
    mask = torch.ones(6, *clip.shape[-2:], dtype=torch.bool)
    mask[1:] = False
    schedule = Schedule.uniform(2, key_value=2, operators=Operators(key_value=DiverseFrames()))
    with spark3r.apply(model, schedule) as handle, handle.masking(mask), torch.no_grad():
        assert model(clip)["depth"].isfinite().all()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(clip)["depth"].isfinite().all()
