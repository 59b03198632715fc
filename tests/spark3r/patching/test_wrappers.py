"""Tools that run a model on overlapping chunks, on loop clips and through methods of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import stand_in_mapanything
import stand_ins
import torch
from torch import Tensor, nn

import spark3r
from spark3r import LayerRule, LayoutError, LengthRule, Operators, QueryMerging, Schedule

CHUNK, OVERLAP, SHORT = 12, 6, 8
REDUCED = Schedule(
    (LayerRule(1, 3), LayerRule(2, 3), LayerRule(2, 3)),
    Operators(QueryMerging(group=4)),
    LengthRule(min_frames=SHORT),
)


class Tool:
    """A tool that has a model inside of an adapter, as VGGT-Long has."""

    def __init__(self, model: Any, call: str = "__call__", batched: bool = False) -> None:
        self.model = nn.Module()
        self.model.model = model.eval()
        self.call, self.batched = call, batched

    def infer(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            given = images[None] if self.batched else images
            output = getattr(self.model.model, self.call)(given)
        if isinstance(output, list):
            return torch.stack([view["depth_along_ray"] for view in output])
        found: Tensor = output["depth"] if "depth" in output else output["local_points"]
        return found

    def run(self, images: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the length and the output of every chunk, and then of one loop clip."""
        for start in range(0, len(images) - OVERLAP, CHUNK - OVERLAP):
            chunk = images[start : start + CHUNK]
            yield len(chunk), self.infer(chunk)
        loop = torch.cat((images[:2], images[-2:]))
        yield len(loop), self.infer(loop)


TOOLS = {
    "vggt": lambda: Tool(stand_ins.Vggt()),
    "pi3": lambda: Tool(stand_ins.Pi3(), batched=True),
    "mapanything": lambda: Tool(stand_in_mapanything.MapAnything(), "infer", batched=True),
    "da3": lambda: Tool(stand_ins.Da3Api(), "inference", batched=True),
}


@pytest.mark.parametrize("name", TOOLS)
def test_chunks_are_reduced_and_short_clips_run_dense(name: str) -> None:
    torch.manual_seed(0)
    tool, images = TOOLS[name](), torch.rand(25, 3, 28, 42)
    dense = list(tool.run(images))
    assert [length for length, _ in dense] == [12, 12, 12, 7, 4]
    ones = replace(REDUCED, layers=(LayerRule(),) * 3)
    with spark3r.apply(tool.model.model, ones):
        for (_, found), (_, expected) in zip(tool.run(images), dense, strict=True):
            assert torch.equal(found, expected)
    with spark3r.apply(tool.model.model, REDUCED):
        for (length, found), (_, expected) in zip(tool.run(images), dense, strict=True):
            assert found.shape == expected.shape
            assert torch.equal(found, expected) == (length < SHORT)


def test_without_a_least_length_a_loop_clip_is_reduced_as_well() -> None:
    torch.manual_seed(0)
    tool, images = TOOLS["vggt"](), torch.rand(4, 3, 28, 42)
    expected = tool.infer(images)
    with spark3r.apply(tool.model.model, replace(REDUCED, length=LengthRule())):
        assert not torch.equal(tool.infer(images), expected)


def test_a_method_that_calls_the_aggregator_past_its_hooks_is_told_of() -> None:
    """OmniVGGT's `inference` does."""
    model = stand_ins.Vggt().eval()
    with (
        spark3r.apply(model, replace(REDUCED, length=LengthRule())),
        torch.no_grad(),
        pytest.raises(LayoutError, match=r"model\(images\) or model\.aggregator\(images\)"),
    ):
        model.aggregator.forward(torch.rand(1, 4, 3, 28, 42))
