"""The guard: code that only looks like a family's is refused in the first pass."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import stand_ins
import torch
import torch.nn.functional as F
from family_cases import CASES, Case, build, images, quiet, reducing, run
from stand_in_parts import HEADS, Da3Attention, VggtAttention
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import spark3r
from spark3r import PatchError, Schedule, TokenLayout, generic
from spark3r.families.parts.da3_memory import on_demand
from spark3r.families.registry import named_family
from spark3r.patching.guard import Guard, has_values
from spark3r.runner import Runner

UNORDERED = ("reference", "mapanything")
"""Families whose order of tokens is not checked: patches overlap, and the entry gets no images."""


class Seen(Guard):
    """A guard that tells what it read."""

    differences: tuple[float, ...] = ()
    order: float = math.nan

    def end(self, family: Any, *, has_run: bool) -> bool:
        for found in self._findings.values():
            self.differences = tuple(float(each) for each in found.layers.values())
            self.order = math.nan if found.order is None else float(found.order)
        return super().end(family, has_run=has_run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family_computes_what_its_models_compute(case: Case, dtype: torch.dtype) -> None:
    if dtype != torch.float32 and case.needs and case.family in ("pi3", "omega", "panovggt"):
        pytest.skip("upstream's heads run in no half precision on a CPU")
    model, clip = build(case), images(case, 5)
    with spark3r.apply(model, reducing(case.layers)) as handle, torch.no_grad():
        handle._guard = seen = Seen()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            run(model, clip)
        assert handle._guard is None
        assert seen.compared == handle.layers
        assert seen.differences == (0.0,) * case.layers
        assert math.isnan(seen.order) if case.family in UNORDERED else 0 < seen.order < 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_first_pass_of_a_runner_is_compared(case: Case) -> None:
    runner = Runner.of(build(case))
    with spark3r.apply(runner.model, reducing(case.layers)) as handle, quiet():
        handle._guard = seen = Seen()
        runner.run(images(case, 5)[0])
        assert handle._guard is None
        assert seen.compared == handle.layers
        assert seen.differences == (0.0,) * case.layers
        assert math.isnan(seen.order) if case.family in UNORDERED else 0 < seen.order < 1


def test_a_changed_model_is_refused_in_a_pass_of_a_runner() -> None:
    class Gated(Da3Attention):
        def forward(self, x: Tensor, pos: Tensor | None = None, attn_mask: Any = None) -> Tensor:
            return self.run(x, pos) * torch.sigmoid(x)

    model = stand_ins.Da3()
    block = model.backbone.pretrained.blocks[5]
    block.attn = Gated(block.attn.rope)
    spark3r.apply(model, reducing(3))
    with pytest.raises(PatchError, match=r"blocks\.5\.attn does not compute"):
        Runner.of(model).run(torch.rand(5, 3, 42, 56))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: torch.rand(2), True),
        (lambda: nn.Parameter(torch.rand(2)), True),
        (lambda: on_demand(torch.rand(2, 3, 4, 4)), True),
        (lambda: torch.rand(2, device="meta"), False),
        (lambda: FakeTensorMode().from_tensor(torch.rand(2)), False),
    ],
    ids=["plain", "a parameter", "normalised on demand", "meta", "fake"],
)
def test_what_has_values_is_compared(make: Callable[[], Tensor], expected: bool) -> None:
    assert has_values(make()) is expected


def test_the_guard_changes_no_output_and_later_passes_do_not_run_it() -> None:
    model, clip = stand_ins.Vggt(), torch.rand(5, 3, 42, 56)
    with spark3r.apply(model, reducing(3), guard=False):
        expected = model(clip)["depth"]
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with spark3r.apply(model, reducing(3)) as handle:
        model.aggregator.patch_embed.register_forward_hook(count)
        assert torch.equal(model(clip)["depth"], expected)
        assert (calls, handle._guard) == (3, None)
        assert torch.equal(model(clip)["depth"], expected)
        assert calls == 4


def altered(change: Callable[[VggtAttention, Tensor, Tensor], Tensor]) -> nn.Module:
    """Return VGGT's stand-in whose global attention runs a function in place of its own steps."""

    class Altered(VggtAttention):
        def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
            return change(self, x, pos)

    torch.manual_seed(0)
    return stand_ins.Vggt(Altered)


def gated(attn: VggtAttention, x: Tensor, pos: Tensor) -> Tensor:
    return attn.run(x, pos) * torch.sigmoid(x)


def scaled_logits(attn: VggtAttention, x: Tensor, pos: Tensor) -> Tensor:
    query, key, value = attn.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    query, key = attn.rope(attn.q_norm(query), pos), attn.rope(attn.k_norm(key), pos)
    query = query * math.log(x.shape[1])
    output = F.scaled_dot_product_attention(query, key, value)
    return attn.proj(output.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda attn, x, pos: attn.run(x, 2 * pos), id="positions doubled"),
        pytest.param(lambda attn, x, pos: attn.run(x, pos // 2), id="positions normalised"),
        pytest.param(lambda attn, x, pos: attn.run(x, None), id="no positions"),
        pytest.param(gated, id="an output gate"),
        pytest.param(scaled_logits, id="logits scaled by log N"),
    ],
)
def test_changed_attention_is_refused_and_the_model_restored(
    change: Callable[[VggtAttention, Tensor, Tensor], Tensor],
) -> None:
    model, clip = altered(change), torch.rand(5, 3, 42, 56)
    before = model(clip)["depth"]
    handle = spark3r.apply(model, reducing(3))
    with pytest.raises(PatchError, match=r"aggregator\.global_blocks\.0\.attn does not compute"):
        model(clip)
    assert not handle.is_active
    assert torch.equal(model(clip)["depth"], before)
    with spark3r.apply(model, reducing(3), guard=False):
        assert not torch.equal(model(clip)["depth"], before)


class PatchByPatch(stand_ins.VggtAggregator):
    """An aggregator whose global tokens are ordered by patch and then by frame."""

    def _process_global_attention(
        self, x: Tensor, b: int, s: int, p: int, c: int, i: int, pos: Tensor
    ) -> tuple[Tensor, int, list[Tensor]]:
        x = x.reshape(b, s, p, c).transpose(1, 2).reshape(b, s * p, c)
        pos = pos.reshape(b, s, p, 2).transpose(1, 2).reshape(b, s * p, 2)
        x = self.global_blocks[i](x, pos=pos)
        x = x.reshape(b, p, s, c).transpose(1, 2).reshape(b, s * p, c)
        return x, i + 1, [x.reshape(b, s, p, c)]


def test_tokens_ordered_patch_by_patch_are_refused() -> None:
    model, clip = stand_ins.Vggt(), torch.rand(5, 3, 42, 56)
    model.aggregator = PatchByPatch()
    with spark3r.apply(model, reducing(3)), pytest.raises(PatchError, match="tokens do not lie"):
        model(clip)
    model(clip)


@pytest.mark.parametrize(
    ("change", "is_right"),
    [({}, True), ({"special_last": True}, False), ({"height": 4, "width": 3}, False)],
    ids=str,
)
def test_a_wrong_description_with_the_right_number_of_tokens_is_refused(
    change: dict[str, Any], is_right: bool
) -> None:
    numbers = {"frames": 5, "height": 3, "width": 4, "special": 3, "anchor_frame": 0} | change

    def layout(images: Tensor) -> tuple[int, TokenLayout]:
        return images.shape[0], TokenLayout(**numbers | {"frames": images.shape[1]})

    family = generic("aggregator.global_blocks.*.attn", entry="aggregator", layout=layout)
    model, clip = stand_ins.Vggt(), torch.rand(5, 3, 42, 56)
    with spark3r.apply(model, reducing(3), family=family):
        if is_right:
            model(clip)
        else:
            with pytest.raises(PatchError, match="tokens do not lie where the generic family"):
                model(clip)


def test_a_compiled_model_is_verified_on_request() -> None:
    model, clip = altered(gated), torch.rand(5, 3, 42, 56)
    handle = spark3r.apply(torch.compile(model, backend="eager"), reducing(3))
    with pytest.raises(PatchError, match="does not compute"):
        handle.verify(clip)
    assert not handle.is_active
    with pytest.raises(PatchError, match="nothing was compared"):
        handle.verify(clip)
    with spark3r.apply(stand_ins.Vggt(), Schedule.dense(3), guard=False) as handle:
        handle.verify(clip)
        with handle.disabled(), pytest.raises(PatchError, match="paused"):
            handle.verify(clip)


def test_a_copy_has_a_guard_of_its_own() -> None:
    model, clip = altered(gated), torch.rand(5, 3, 42, 56)
    spark3r.apply(model, reducing(3))
    twin = copy.deepcopy(model)
    with pytest.raises(PatchError, match="does not compute"):
        model(clip)
    with pytest.raises(PatchError, match="does not compute"):
        twin(clip)
    twin(clip)


def test_the_model_is_restored_when_the_last_pass_under_way_has_ended() -> None:
    model, clip = altered(gated), torch.rand(5, 3, 42, 56)
    handle = spark3r.apply(model, reducing(3))
    inside, leave = threading.Event(), threading.Event()
    errors: list[str] = []

    def wait(*_: Any) -> None:
        if threading.current_thread() is other:
            inside.set()
            leave.wait(30)

    def another_pass() -> None:
        try:
            model(torch.rand(4, 3, 42, 56))
        except PatchError as error:
            errors.append(str(error))

    other = threading.Thread(target=another_pass)
    model.aggregator.global_blocks[1].register_forward_hook(wait)
    other.start()
    assert inside.wait(30)
    with pytest.raises(PatchError, match="does not compute"):
        model(clip)
    assert handle.is_active
    with pytest.raises(PatchError, match="does not compute"):
        model(clip)  # a pass that begins now is refused as well
    leave.set()
    other.join()
    assert len(errors) == 1
    assert not handle.is_active


def test_training_goes_on_with_the_same_random_numbers() -> None:
    model, clip = stand_ins.Vggt(), torch.rand(5, 3, 42, 56)
    for block in model.aggregator.frame_blocks:
        block.attn.proj_drop.p = 0.3
    model.train()
    depths = []
    for guard in (True, False):
        torch.manual_seed(0)
        with spark3r.apply(model, reducing(3), guard=guard):
            depths.append(model(clip)["depth"])
    assert torch.equal(*depths)
    depths[0].sum().backward()


def test_values_that_are_not_finite_are_not_the_guards_to_judge() -> None:
    model, clip = stand_ins.Vggt(), torch.rand(5, 3, 42, 56)
    with torch.no_grad():
        model.aggregator.global_blocks[1].attn.proj.bias[0] = math.nan
    with spark3r.apply(model, reducing(3)):
        assert model(clip)["depth"].isnan().any()


def test_a_replacement_that_gives_nan_is_refused() -> None:
    vggt = named_family("vggt")
    broken = replace(vggt, reduced_forward=lambda attn, layout, rule, x, pos: x * math.nan)
    model = stand_ins.Vggt()
    with (
        spark3r.apply(model, reducing(3), family=broken),
        pytest.raises(PatchError, match="differ by nan"),
    ):
        model(torch.rand(5, 3, 42, 56))
