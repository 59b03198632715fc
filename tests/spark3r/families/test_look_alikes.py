"""Models that resemble a family without being one are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import stand_in_mapanything
import stand_in_panovggt
import stand_in_worldmirror
import stand_ins
import torch
from stand_in_parts import WIDTH, Attention, MergingAttention
from torch import Tensor, nn

import spark3r
from spark3r import FamilyError, LayoutError, Schedule
from spark3r.families.registry import FAMILIES, detect
from spark3r.reduction.operators import Operators, QueryMerging
from spark3r.runner import Runner


class WindowAttention(Attention):
    """Attention with an argument that no family's attention has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor, window: int = 0) -> Tensor:
        return self.run(x, None)


def _depth_anything_2() -> nn.Module:
    backbone = stand_ins.Da3().backbone
    del backbone.pretrained.alt_start
    return backbone


def _changed_da3() -> nn.Module:
    model = stand_ins.Da3()
    model.backbone.pretrained.blocks[3].attn = WindowAttention()
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fastvggt": (lambda: stand_ins.Vggt(MergingAttention), "this is FastVGGT, which"),
    "vggt": (lambda: stand_ins.Vggt(WindowAttention), r"takes \(x, window\), expected \(x, pos\)"),
    "pi3": (lambda: stand_ins.Pi3(WindowAttention), r"expected \(x, attn_bias, xpos\)"),
    "omega": (lambda: stand_ins.Omega(WindowAttention), r"expected \(x, attn_bias, rope\)"),
    "mapanything": (lambda: stand_in_mapanything.MapAnything(WindowAttention), r"\(x, xpos\)$"),
    "panovggt": (lambda: stand_in_panovggt.PanoVggt(WindowAttention), r"\(x, xpos, kwargs\)$"),
    "worldmirror": (lambda: stand_in_worldmirror.WorldMirror(WindowAttention), r"\(x, pos\)$"),
    "da3": (_changed_da3, r"expected \(x, pos, attn_mask\)"),
    "da3-metric": (lambda: stand_ins.Da3(alt_start=-1), "metric or monocular Depth-Anything-3"),
    "depth-anything-2": (_depth_anything_2, "like Depth-Anything 1 and 2"),
    "unknown": (lambda: nn.Linear(2, 2), r"is of no family that spark3r knows \(.*vggt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(FamilyError, match=reason):
        detect(make())


@pytest.mark.parametrize(
    ("make", "cache"),
    [
        (stand_ins.Vggt, lambda m: m.aggregator.position_getter.position_cache),
        (stand_ins.Pi3, lambda m: m.position_getter.cache_positions),
        (stand_ins.Da3, lambda m: m.backbone.pretrained.position_getter.position_cache),
    ],
    ids=["vggt", "pi3", "da3"],
)
def test_positions_left_on_another_device_are_named(
    make: Callable[[], nn.Module], cache: Callable[[Any], dict[Any, Tensor]]
) -> None:
    model = make()
    cache(model)[2, 3] = torch.empty(6, 2, device="meta")
    with (
        spark3r.apply(model, Schedule.uniform(3, key_value=2)),
        pytest.raises(LayoutError, match=r"still holds token positions on meta .*\.clear\(\)"),
    ):
        model(torch.rand(1, 3, 3, 28, 42))


def test_attention_dropout_is_refused_in_training() -> None:
    model = stand_ins.Vggt()
    model.aggregator.global_blocks[1].attn.attn_drop.p = 0.1
    clip = torch.rand(1, 3, 3, 28, 42)
    with spark3r.apply(model.eval(), Schedule.uniform(3, key_value=2)):
        model(clip)
        model.train()
        with pytest.raises(FamilyError, match=r"trains with attention dropout 0\.1"):
            model(clip)


def test_a_mask_or_bias_is_refused() -> None:
    model = stand_ins.Pi3()
    attn, clip = model.decoder[1].attn, torch.rand(1, 3, 3, 28, 42)
    with spark3r.apply(model, Schedule.uniform(3, key_value=2)):
        model(clip)
        with pytest.raises(FamilyError, match="was given attn_bias"):
            attn(torch.rand(1, 24, WIDTH), attn_bias=torch.zeros(24, 24))


def test_a_call_past_the_entry_says_how_to_call() -> None:
    model = stand_ins.Pi3()
    with (
        spark3r.apply(model, Schedule.uniform(3, key_value=2)),
        pytest.raises(LayoutError, match=r"not model\.forward or model\.decode"),
    ):
        model.forward(torch.rand(1, 3, 3, 28, 42))


def test_the_aggregator_alone_is_a_model_too() -> None:
    for model in (stand_ins.VggtAggregator(), stand_ins.OmegaAggregator()):
        clip = torch.rand(1, 6, 3, 2 * model.patch_size, 3 * model.patch_size)
        dense = model(clip)[0][-1]
        names = list(detect(model).attention(model))
        assert not any(name.startswith("aggregator.") for name in names)
        with spark3r.apply(
            model, Schedule.uniform(3, 2, 2, operators=Operators(QueryMerging(group=3)))
        ):
            assert not torch.equal(model(clip)[0][-1], dense)


NAMED = [name for name in FAMILIES if name not in ("reference", "pi3")]


@pytest.mark.parametrize("family", NAMED)
def test_a_family_that_is_named_for_another_model_is_an_error(family: str) -> None:
    model = stand_ins.Pi3()
    with pytest.raises(FamilyError, match=rf"Pi3 does not .* '{family}', .*is of family 'pi3'"):
        Runner.of(model, family)
