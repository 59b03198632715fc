"""torch.compile without graph breaks, one compilation per clip length."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from qkv import reduced
from small_models import make_images
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from toy_model import ToyAttention, ToyModel

import spark3r
from spark3r import LayerRule, Operators, Schedule, Spark3rWarning
from spark3r.families import generic
from spark3r.layout import TokenLayout
from spark3r.patching.handle import Handle
from spark3r.reduction.operators import QueryMerging, TokenStride
from spark3r.reduction.rule import ResolvedRule
from spark3r.runner import Runner

pytestmark = pytest.mark.dynamo

PAPER = Schedule((LayerRule(3, 2), LayerRule(1, 4)), Operators(QueryMerging(group=4)))
FAITHFUL = Schedule(
    (LayerRule(1, 4), LayerRule(4, 2)),
    Operators(
        QueryMerging(group=5, unmerge="linear"), TokenStride(keep_anchor=True, mass_correction=1.0)
    ),
)
ONE = Schedule((LayerRule(3, 2),), Operators(QueryMerging(group=4)))
TOY = generic("attn", patch_size=8)
LENGTHS = range(4, 16)
FEW_LENGTHS = (4, 9, 15)  # a short group, a group and a short one, whole groups


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    # Dynamo compiles one code object 8 times by default; a clip length is one compilation.
    with torch._dynamo.config.patch(recompile_limit=16):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("unmerge", "backend", "lengths"),
    [
        ("copy", "eager", FEW_LENGTHS),
        pytest.param("linear", "eager", FEW_LENGTHS, marks=pytest.mark.slow),
        *(
            pytest.param(unmerge, backend, LENGTHS, marks=pytest.mark.slow)
            for unmerge in ("copy", "linear")
            for backend in ("eager", "aot_eager")
        ),
    ],
)
def test_our_attention_compiles_once_per_length(unmerge, backend, lengths):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(reduced, fullgraph=True, backend=counter)
    operators = Operators(QueryMerging(group=5, unmerge=unmerge), TokenStride(mass_correction=0.5))
    rule = ResolvedRule(4, 3, operators)
    for frames in lengths:
        layout = TokenLayout(frames, 3, 4, special=2, anchor_frame=0)
        tensors = torch.randn(3, 1, 2, layout.tokens, 4).unbind(0)
        expected = reduced(*tensors, layout, rule)
        for _ in range(2):
            torch.testing.assert_close(compiled(*tensors, layout, rule), expected)
    assert counter.frame_count == len(lengths)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "schedule"), [("eager", PAPER), ("aot_eager", FAITHFUL)])
def test_the_patched_model_compiles_once_per_length(model, backend, schedule):
    counter = CompileCounterWithBackend(backend)
    spark3r.apply(model, schedule)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for frames in LENGTHS:
            images = make_images(frames, 16, 16)
            expected = model(images)["depth"]
            for _ in range(2):
                torch.testing.assert_close(compiled(images)["depth"], expected)
    assert counter.frame_count == len(LENGTHS)


@pytest.mark.slow
def test_patching_pausing_and_removing_after_compilation_are_honoured():
    model = ToyModel()
    images = make_images(8, 16, 16)[None]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        dense = compiled(images)
        handle = spark3r.apply(compiled, ONE, family=TOY)
        expected = model(images)
        assert not torch.equal(expected, dense)
        torch.testing.assert_close(compiled(images), expected)
        with handle.disabled():
            torch.testing.assert_close(compiled(images), dense)
        torch.testing.assert_close(compiled(images), expected)
        handle.remove()
        torch.testing.assert_close(compiled(images), dense)


@pytest.mark.slow
def test_compiled_parts_of_an_eager_model_find_their_pass(model):
    spark3r.apply(model, PAPER)
    clips = [make_images(frames, 16, 16) for frames in (6, 9)]
    with torch.no_grad():
        expected = [model(images)["depth"] for images in clips]
        for block in model.aggregator.global_blocks:
            block.compile(fullgraph=True, backend="eager")
        for images, value in zip((*clips, *clips), (*expected, *expected), strict=True):
            torch.testing.assert_close(model(images)["depth"], value)


@pytest.mark.slow
def test_the_generic_family_compiles():
    model = ToyModel()
    spark3r.apply(model, ONE, family=TOY)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    images = make_images(8, 16, 16)[None]
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images))


class TwoLayers(ToyModel):
    """Two layers of global attention, and a break of the graph before each."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleList([ToyAttention(), ToyAttention()])

    def forward(self, images):
        patches = nn.functional.unfold(images.flatten(0, 1), 8, stride=8).transpose(1, 2)
        tokens = self.embed(patches).reshape(images.shape[0], -1, 8)
        for attention in self.attn:
            torch._dynamo.graph_break()
            tokens = tokens + attention(tokens)
        return tokens


@pytest.mark.slow
def test_graph_breaks_and_the_recompile_limit_only_cost_speed():
    # Upstream rotary embeddings break the graph, and all layers share one code object: past the
    # limit some layers run eagerly inside a pass that a compiled graph began.
    model = TwoLayers()
    images = make_images(8, 16, 16)[None]
    spark3r.apply(model, Schedule.uniform(2, 3, 2), family=generic("attn.[01]", patch_size=8))
    with torch.no_grad():
        expected = model(images)
        with torch._dynamo.config.patch(recompile_limit=1):
            compiled = torch.compile(model, backend="eager")
            for _ in range(2):
                torch.testing.assert_close(compiled(images), expected)


def test_warnings_reach_the_user_of_a_compiled_model():
    model = ToyModel()
    spark3r.apply(model, Schedule.uniform(1, 1, 50), family=TOY)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.warns(Spark3rWarning, match="larger than a clip of 3 frames"):
        compiled(make_images(3, 16, 16)[None])


@pytest.mark.slow
def test_a_compiled_pass_knows_its_precision():
    model = ToyModel()
    Handle(Runner.of(model, TOY), ONE, dtypes=frozenset({"bfloat16"})).install()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    images = make_images(5, 16, 16)[None]
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            compiled(images)  # warnings are errors here
        with pytest.warns(Spark3rWarning, match="measured in bfloat16, this pass runs in float32"):
            compiled(images)
