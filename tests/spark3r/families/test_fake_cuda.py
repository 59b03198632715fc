"""What passes do on CUDA, traced on a device that exists in name only (`fake_cuda`).

Each global layer of a pass has operators of its own: those of the paper, mass correction, linear
unmerging. The last tests break the code, and each check must notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import cycle
from pathlib import Path

import fake_cuda
import pytest
import torch
from device_traces import Trace
from fake_cuda import CUDA, fake_model, traced, traced_call, traced_layer
from family_cases import CASES, Case, build, layout_of, quiet
from small_models import make_model
from stand_in_parts import (
    Attention,
    Da3Attention,
    MaskedBiasLinear,
    OmegaAttention,
    Pi3Attention,
    Rotary,
    VggtAttention,
)
from torch import Tensor, nn
from upstream_needed import need_upstream

import spark3r
from spark3r import LayerRule, Operators, Schedule, TokenLayout
from spark3r.families.parts import memory
from spark3r.families.registry import FAMILIES, detect
from spark3r.kernels import grouped_attention
from spark3r.kernels.limits import MOST_NORMALISED
from spark3r.loading.architecture import load_architecture
from spark3r.reduction import merging
from spark3r.reduction.operators import DiverseFrames, QueryMerging, TokenStride
from spark3r.reduction.plans import key_value_length
from spark3r.reduction.rule import ResolvedRule

pytestmark = pytest.mark.skipif(
    not fake_cuda.IS_TRIED, reason="fake tensors of older versions of torch are not tried"
)

BF16, FP32 = torch.bfloat16, torch.float32
PAPER = Operators()
MASS = Operators(key_value=TokenStride(keep_anchor=True, mass_correction=1.0))
LINEAR = Operators(QueryMerging(unmerge="linear"))
BOTH = Operators(LINEAR.query, MASS.key_value)

STAND_INS = [case for case in CASES if not case.needs]
# The fast tier traces those that differ most, in clips too short for frames to run in pieces.
FAST = ("vggt-stand-in", "pi3-stand-in", "omega-stand-in")
FEW = [case for case in STAND_INS if case.name in FAST]

PACKAGE = Path(spark3r.__file__).parent


@cache
def _fake(case: Case) -> nn.Module:
    return fake_model(make_model(pairs=3) if case.name == "reference" else build(case))


def _check_pass(case: Case, frames: int, dtype: torch.dtype, fused: bool) -> None:
    model = _fake(case)
    family = detect(model)
    rules = [
        LayerRule(2, 3, replace(each, query=replace(each.query, group=4)))
        for each in (PAPER, MASS, LINEAR)
    ]
    clip = (frames, 2 * case.patch_size, 3 * case.patch_size)
    trace = traced(model, Schedule(tuple(rules)), clip, dtype=dtype, fused=fused)
    assert trace.waits(PACKAGE) == []
    for call in trace.attention:
        assert set(call.dtypes) == {dtype}, f"{call.place} is given {call.dtypes}"
    layout = layout_of(case, frames)
    for name, rule in zip(family.attention(model), rules, strict=True):
        _check_layer(trace.inside(name), layout, rule.resolve(PAPER), dtype, fused)
        _check_products(trace.inside(name), layout, rule.resolve(PAPER), case.family)


def _check_layer(
    trace: Trace, layout: TokenLayout, rule: ResolvedRule, dtype: torch.dtype, fused: bool
) -> None:
    """Check how a reduced layer attends, and that nothing waits or is too large."""
    assert trace.waits() == []
    assert trace.too_large() == []
    for call in trace.attention:
        assert set(call.dtypes) == {dtype}, f"attention is given {call.dtypes}"
    corrected, masks = rule.operators.key_value.mass_correction, {m.mask for m in trace.attention}
    if corrected and not fused:
        assert masks == {dtype}, f"the mask is in {masks}"
    else:
        assert masks == {None}, f"there is a mask in {masks}"
    by_group = all(call.name != "sdpa" for call in trace.attention)
    assert by_group == (fused and corrected > 0)


def _check_products(trace: Trace, layout: TokenLayout, rule: ResolvedRule, family: str) -> None:
    """Check that a reduced layer projects no more than it needs."""
    tokens, kept = layout.tokens, key_value_length(layout, rule)
    rows, width = trace.products(), min(trace.products())
    if family == "omega":  # its projection cannot be sliced
        assert rows == {width: tokens, 3 * width: tokens + kept}
    else:
        assert rows == {width: 2 * tokens, 2 * width: kept}, f"{rows} rows of products by width"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=() if case in FEW else pytest.mark.slow)
        for case in STAND_INS
    ],
)
def test_a_pass_under_autocast_with_fused_kernels(case: Case) -> None:
    _check_pass(case, 11, BF16, fused=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "fused", "cases"),
    [
        pytest.param(BF16, True, STAND_INS, id="fused-bf16"),
        pytest.param(FP32, False, STAND_INS, id="plain-fp32"),
        pytest.param(BF16, False, FEW, id="plain-bf16"),
        pytest.param(FP32, True, FEW, id="fused-fp32"),
    ],
)
def test_passes_in_pieces(dtype: torch.dtype, fused: bool, cases: Sequence[Case]) -> None:
    for case in cases:
        _check_pass(case, 23, dtype, fused)


# Global attention of the published models, and the tokens of a frame of 518x392 pixels (512x384 for
# VGGT-Omega).
SIZES: dict[str, tuple[Callable[..., Attention], int, int, tuple[int, int, int]]] = {
    "vggt": (VggtAttention, 1024, 16, (28, 37, 5)),
    "pi3": (Pi3Attention, 1024, 16, (28, 37, 5)),
    "da3": (Da3Attention, 1536, 24, (28, 37, 1)),
    "omega": (OmegaAttention, 1024, 16, (24, 32, 17)),
}


@cache
def _attention(family: str) -> nn.Module:
    kind, width, heads, _ = SIZES[family]
    rope = {"pi3": "base", "omega": None}.get(family, "base_frequency")
    linear = MaskedBiasLinear if family == "omega" else nn.Linear
    with torch.device("meta"):
        attn = kind(rope and Rotary(rope), linear, width, heads)
    return fake_model(attn)


def _layer(
    family: str,
    frames: int,
    rule: ResolvedRule,
    dtype: torch.dtype = BF16,
    fused: bool = True,
    save_memory: bool = True,
) -> Trace:
    """Return the trace of a layer of a published model's size, and check it."""
    layout = _layout(family, frames)
    positions = (torch.empty(0),) if family == "da3" else ()
    attn = _attention(family)
    how = {"dtype": dtype, "fused": fused, "save_memory": save_memory}
    trace = traced_layer(FAMILIES[family], attn, layout, rule, *positions, **how)
    _check_layer(trace, layout, rule, dtype, fused)
    _check_products(trace, layout, rule, family)
    return trace


def test_frames_are_chosen_by_content_without_waiting() -> None:
    rule = ResolvedRule(1, 25, Operators(key_value=DiverseFrames(mass_correction=1.0)))
    layout = _layout("vggt", 1000)
    trace = traced_layer(FAMILIES["vggt"], _attention("vggt"), layout, rule)
    assert trace.waits() == []
    assert trace.too_large() == []


@pytest.mark.parametrize(
    ("operators", "whole", "pieces"),
    [(PAPER, 30, 219), (MASS, 46, 235), (LINEAR, 81, 305)],
    ids=["paper", "mass", "linear"],
)
def test_kernels_of_a_layer_of_vggt_at_1000_frames(
    operators: Operators, whole: int, pieces: int
) -> None:
    rule = ResolvedRule(3, 8, operators)
    trace = _layer("vggt", 1000, rule, save_memory=False)
    assert len(trace.kernels) <= whole, " ".join(trace.kernels)
    assert len(_layer("vggt", 1000, rule).kernels) <= pieces


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fused"), [*((name, True) for name in SIZES), ("vggt", False), ("da3", False)]
)
def test_no_kernel_counts_too_far_in_the_longest_clip(family: str, fused: bool) -> None:
    _layer(family, _longest(family), ResolvedRule(2, 8, BOTH), fused=fused)


def _layout(family: str, frames: int) -> TokenLayout:
    height, width, special = SIZES[family][3]
    anchor = None if family == "pi3" else 0
    return TokenLayout(frames, height, width, special, anchor_frame=anchor)


def _longest(family: str) -> int:
    """Return the frames of the longest clip that every version of torch normalises right."""
    return (MOST_NORMALISED - 1) // (_layout(family, 1).tokens * SIZES[family][1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param("vggt:random", (392, 518), id="vggt"),
        pytest.param("pi3:random-pi3", (392, 518), id="pi3"),
        pytest.param("da3:random-giant", (392, 518), id="da3"),
        pytest.param("omega:random", (384, 512), id="omega"),
    ],
)
def test_1000_frames_of_a_published_model(
    name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = name.partition(":")[0]
    need_upstream(family)
    monkeypatch.setattr(memory, "MOST_FRAMES", 500)  # pieces of the usual size take a minute
    monkeypatch.setattr(memory, "MOST_TOKENS", 2**19)
    with quiet():
        model = fake_model(load_architecture(name))
    names = list(detect(model).attention(model))
    operators = [each for each, _ in zip(cycle((PAPER, MASS, LINEAR)), names, strict=False)]
    # At a factor that 1000 frames do not divide by, masses of special tokens and patches differ.
    rules = [ResolvedRule(3, 7, each) for each in operators]
    schedule = Schedule(tuple(LayerRule(3, 7, each) for each in operators))
    trace = traced(model, schedule, (1000, *size), without_heads=True)
    assert trace.waits(PACKAGE) == []
    assert trace.too_large() == []
    for name, rule in zip(names, rules, strict=True):
        _check_layer(trace.inside(name), _layout(family, 1000), rule, BF16, fused=True)
        _check_products(trace.inside(name), _layout(family, 1000), rule, family)


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0, 0]),
    "int": lambda x: int(x[0, 0]),
    "truth": lambda x: bool((x > 0).any()),
    "list": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "mask of rows": lambda x: x[:, x[0] > 0],
    "written by a mask": lambda x: x.__setitem__(x > 0, 0.0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: torch.bincount(x.long().flatten()),
    "repeat_interleave": lambda x: x.repeat_interleave(x[0].long(), dim=1),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", torch.float64),
    "copied to the host": lambda x: torch.empty(3, 4, device="cpu").copy_(x),
    "copied from the host": lambda x: x.copy_(torch.empty(3, 4, device="cpu")),
    "number from the host": lambda x: torch.tensor([1.0], device=CUDA),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "list as an index": lambda x: x[:, [0, 1]],
}


@pytest.mark.parametrize("read", WAITING.values(), ids=WAITING)
def test_whatever_waits_for_the_device_is_seen(read: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError, match=rf"{Path(__file__).name}:\d+: .*waits"):
        assert traced_call(read, torch.empty(3, 4)).waits() == []


def test_what_does_not_wait_is_not_blamed() -> None:
    def work(x: Tensor) -> None:
        x[:, 1:] = x[:, :1] * 2.0
        x[..., torch.arange(2, device=CUDA)] += x.new_full((2,), 3.0)
        x.repeat_interleave(2, dim=1).masked_fill_(x.repeat(1, 2) > 0, 0.0).to(BF16)
        x.topk(2).indices[None].contiguous()

    trace = traced_call(work, torch.empty(3, 4))
    assert trace.waits() == []
    assert "topk" in trace.kernels


FRAMES = 6
RULE = ResolvedRule(2, 3, PAPER)
CORRECTED = ResolvedRule(2, 3, MASS)


def _also(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Let a step of merging change its result."""
    original: Callable[..., Tensor] = getattr(merging, name)
    monkeypatch.setattr(merging, name, lambda *args: change(original(*args)))


def test_a_pass_that_waits_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    _layer("vggt", FRAMES, RULE)
    _also(monkeypatch, "merge", lambda x: x * x.mean().item())
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"):
        _layer("vggt", FRAMES, RULE)
    monkeypatch.undo()
    _also(monkeypatch, "merge", lambda x: x * torch.tensor(2.0, dtype=BF16).to(CUDA))
    with pytest.raises(AssertionError, match="a copy between cpu and cuda waits"):
        _layer("vggt", FRAMES, RULE)


def test_float32_queries_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    _also(monkeypatch, "merge", lambda x: x.float())
    with pytest.raises(AssertionError, match=r"attention is given \(torch.float32, torch.bfloat16"):
        _layer("vggt", FRAMES, RULE)


def test_a_float32_mask_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    original = grouped_attention.masked
    monkeypatch.setattr(
        grouped_attention,
        "masked",
        lambda query, key, value, bias, scale: original(query, key, value, bias.float(), scale),
    )
    _layer("vggt", FRAMES, CORRECTED)
    with pytest.raises(AssertionError, match=r"the mask is in \{torch.float32}"):
        _layer("vggt", FRAMES, CORRECTED, fused=False)


def test_a_mask_where_groups_are_joined_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_attention, "implementation", lambda *_: grouped_attention.MASK)
    with pytest.raises(AssertionError, match=r"there is a mask in \{torch.bfloat16}"):
        _layer("vggt", FRAMES, CORRECTED)


def test_keys_of_dropped_tokens_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_cuda, "_is_plain_linear", lambda module: False)
    with pytest.raises(AssertionError, match="rows of products"):
        _layer("vggt", FRAMES, RULE)


def test_one_more_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    _also(monkeypatch, "merge", lambda x: x + 0)
    with pytest.raises(AssertionError, match="add _scaled_dot_product_flash_attention"):
        test_kernels_of_a_layer_of_vggt_at_1000_frames(PAPER, 30, 219)


@pytest.mark.slow
def test_a_mask_that_is_read_beyond_32_bits_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = replace(CORRECTED, key_value=8)
    _layer("vggt", 200, rule, fused=False)
    monkeypatch.setattr(grouped_attention, "MOST_MASKED", 2**40)
    with pytest.raises(AssertionError, match="_scaled_dot_product_efficient_attention of"):
        _layer("vggt", 200, rule, fused=False)
