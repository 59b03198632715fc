"""Models inside other modules, and attention inside wrappers, are found by their structure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import stand_ins
import torch
from family_cases import CASES, Case, attentions, build, difference, images, reducing, run
from torch import Tensor, nn
from upstream_models import flat

import spark3r
from spark3r import FamilyError, PatchError, generic
from spark3r.families.registry import detect
from spark3r.runner import Runner

STAND_INS = [case for case in CASES if not case.needs and case.family != "reference"]


class Around(nn.Module):
    """A wrapper that calls what it holds, under a name of its own."""

    def __init__(self, held: nn.Module, name: str = "held") -> None:
        super().__init__()
        self.name = name
        setattr(self, name, held)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.name)(*args, **kwargs)


class Handing(Around):
    """A wrapper that also hands on the attributes of what it holds, as PEFT's do."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("held"), name)


class Pipeline(nn.Module):
    """A model among other parts, two levels down."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.resize, self.scale = nn.Identity(), nn.Parameter(torch.ones(()))
        self.front_end = Around(model, "model")
        self.front_end.extra = nn.Linear(2, 2)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.front_end(self.resize(args[0]), *args[1:], **kwargs)


def wrap_attention(model: nn.Module, wrapper: type[Around]) -> None:
    for attn in attentions(model).values():
        parent = next(each for each in model.modules() if attn in each.children())
        parent.attn = wrapper(attn)


def wrap_blocks(model: nn.Module, wrapper: type[Around]) -> None:
    for attn in attentions(model).values():
        block = next(each for each in model.modules() if attn in each.children())
        blocks = next(each for each in model.modules() if block in each.children())
        assert isinstance(blocks, nn.ModuleList)
        blocks[list(blocks).index(block)] = wrapper(block)


def without_proj_drop(model: nn.Module, wrapper: object) -> None:
    for attn in attentions(model).values():
        del attn.proj_drop


@pytest.mark.parametrize("wrapper", [Around, Handing])
@pytest.mark.parametrize("change", [wrap_attention, wrap_blocks, without_proj_drop])
@pytest.mark.parametrize("case", STAND_INS, ids=str)
def test_changed_around_attention_a_model_is_reduced_as_before(
    case: Case, change: Callable[[nn.Module, type[Around]], None], wrapper: type[Around]
) -> None:
    clip = images(case, 5)
    plain, model = build(case), copy.deepcopy(build(case))
    change(model, wrapper)
    dense = run(model, clip)
    with spark3r.apply(plain, reducing(case.layers)):
        expected, predicted = run(plain, clip), flat(Runner.of(plain).run(clip[0]))
    with spark3r.apply(model, reducing(case.layers)) as handle:
        assert list(handle.layers) == list(attentions(plain))
        assert difference(run(model, clip), expected) == 0.0
        assert handle._guard is None
        assert difference(flat(Runner.of(model).run(clip[0])), predicted) == 0.0
    assert difference(run(model, clip), dense) == 0.0


@pytest.mark.parametrize("wrap", [Around, Handing, Pipeline, lambda m: Handing(Handing(m))])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_inside_others_is_found(case: Case, wrap: Callable[[nn.Module], nn.Module]) -> None:
    clip = images(case, 5)
    inner = copy.deepcopy(build(case))
    model = wrap(inner).eval()
    dense = run(model, clip)
    with spark3r.apply(inner, reducing(case.layers)):
        expected, predicted = run(inner, clip), flat(Runner.of(inner).run(clip[0]))
        assert spark3r.is_applied(model)
    handle = spark3r.apply(model, reducing(case.layers))
    assert handle.root is inner or case.family == "da3"  # which may be called `model` in another
    assert difference(run(model, clip), expected) == 0.0
    found = flat(Runner.of(model).run(clip[0]))  # with outputs that code around may read
    assert difference({name: found[name] for name in predicted}, predicted) == 0.0
    assert handle._guard is None
    assert spark3r.is_applied(model)
    assert spark3r.is_applied(inner)
    named = spark3r.apply(model, reducing(case.layers), family=case.family)
    assert not handle.is_active
    assert difference(run(model, clip), expected) == 0.0
    spark3r.remove(model)
    assert not named.is_active
    assert difference(run(model, clip), dense) == 0.0


def test_code_around_a_model_may_read_what_no_prediction_reads() -> None:
    class Points(Pipeline):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return {"points": super().forward(*args, **kwargs)["world_points"]}

    runner = Runner.of(Points(stand_ins.Vggt()))
    with spark3r.apply(runner.model, reducing(3)):
        assert runner.run(torch.rand(5, 3, 42, 56))["points"].shape == (1, 5, 42, 56, 3)


def test_a_wrapper_that_changes_the_order_of_tokens_is_refused() -> None:
    class Shuffled(Around):
        def forward(self, x: Tensor, pos: Tensor) -> Tensor:
            output: Tensor = self.held(x.flip(1), pos.flip(1)).flip(1)
            return output

    model = stand_ins.Vggt()
    wrap_attention(model, Shuffled)
    with spark3r.apply(model, reducing(3)), pytest.raises(PatchError, match="tokens do not lie"):
        model(torch.rand(5, 3, 42, 56))


def test_a_patch_under_another_family_is_replaced() -> None:
    inner, clip = stand_ins.Vggt(), torch.rand(5, 3, 42, 56)
    model = Around(inner).eval()
    dense = run(model, clip)
    first = spark3r.apply(model, reducing(3))
    family = generic(
        "held.aggregator.global_blocks.*.attn",
        entry="held.aggregator",
        patch_size=14,
        special=3,
        anchor_frame=0,
    )
    second = spark3r.apply(model, reducing(3), family=family)
    assert not first.is_active
    run(model, clip)
    second.remove()
    assert difference(run(model, clip), dense) == 0.0


def test_several_models_inside_one_are_named() -> None:
    model = nn.ModuleDict({"student": stand_ins.Vggt(), "teacher": stand_ins.Pi3()})
    with pytest.raises(FamilyError, match=r"holds 2 models .*, student, teacher: apply to each"):
        detect(model)
    assert Runner.of(model, "pi3").root is model["teacher"]


def test_a_look_alike_inside_a_wrapper_is_refused_with_the_reason() -> None:
    class Windowed(stand_ins.Attention):
        def forward(self, x: Tensor, window: int = 0) -> Tensor:
            return self.run(x, None)

    for family in (None, "vggt"):
        with pytest.raises(FamilyError, match=r"Around cannot be reduced: .*takes \(x, window\)"):
            Runner.of(Around(stand_ins.Vggt(Windowed)), family)


def test_a_family_that_is_named_for_an_unknown_model_says_what_to_do() -> None:
    with pytest.raises(FamilyError, match=r"Linear does not .*'vggt', .*spark3r\.generic"):
        Runner.of(nn.Linear(2, 2), "vggt")
