"""The properties of every family, on stand-ins and on the real upstream code.

SPARK3R_REQUIRE names families ("da3" or "da3,vggt") whose upstream code must be there: the suite
then fails where it would otherwise report NOT VERIFIED.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from family_cases import (
    CASES,
    TAKES_CLIP,
    Case,
    attentions,
    build,
    difference,
    entry_call,
    images,
    layout_of,
    quiet,
    reducing,
    run,
)
from torch import Tensor, nn
from upstream_models import flat
from upstream_needed import need_upstream

import spark3r
from spark3r import Schedule
from spark3r.families.registry import FAMILIES, detect
from spark3r.reduction.operators import Operators, QueryMerging, TokenStride
from spark3r.reduction.rule import ResolvedRule


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture
def model(case: Case) -> Any:
    found = build(case)
    yield found
    assert not spark3r.is_applied(found), "a test left its schedule on the shared model"


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "reference"])
def test_upstream_code_was_there(family: str) -> None:
    need_upstream(family)


def test_recognised_by_structure(case: Case, model: nn.Module) -> None:
    family = detect(model)
    assert family.name == case.family
    found = family.attention(model)
    assert len(found) == case.layers
    assert all(model.get_submodule(name) is attn for name, attn in found.items())
    assert family.metadata(model)["patch_size"] == case.patch_size
    assert detect(torch.compile(model, backend="eager")) is family


def test_token_layout_of_a_clip(case: Case, model: nn.Module) -> None:
    family = detect(model)
    seen: list[int] = []
    first = next(iter(family.attention(model).values()))
    hook = first.register_forward_pre_hook(lambda attn, args: seen.append(args[0].shape[1]))
    clip = images(case, 5, batch=2)
    args, kwargs = entry_call(model, clip)
    hook.remove()
    batch, layout = family.layout(family.entry(model), args, kwargs)
    assert (batch, layout) == (2, layout_of(case, 5))
    assert seen == [layout.tokens]


def test_factors_of_one_are_bit_identical_and_removal_restores(
    case: Case, model: nn.Module
) -> None:
    clip = images(case, 5)
    dense = run(model, clip)
    before = _state(model)
    handle = spark3r.apply(model, Schedule.dense(case.layers))
    assert difference(run(model, clip), dense) == 0.0
    handle.remove()
    with spark3r.apply(model, reducing(case.layers)) as reduced:
        assert difference(run(model, clip), dense) > 1e-6
        with reduced.disabled():
            assert difference(run(model, clip), dense) == 0.0
    assert _state(model) == before
    assert difference(run(model, clip), dense) == 0.0


def test_forced_through_our_path_factors_of_one_change_nothing(
    case: Case, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = images(case, 5, batch=2)
    dense = run(model, clip)
    monkeypatch.setattr(ResolvedRule, "is_dense", property(lambda rule: False))
    calls = _count_calls(monkeypatch, case)
    with spark3r.apply(model, Schedule.dense(case.layers), guard=False):
        assert difference(run(model, clip), dense) == 0.0
    assert len(calls) == case.layers


@pytest.mark.parametrize("frames", [1, 2, 3, 21, 60])
def test_reduced_run_has_the_shapes_of_a_dense_one(
    case: Case, model: nn.Module, frames: int
) -> None:
    clip = images(case, frames, rows=1, columns=2)
    dense = run(model, clip)
    with spark3r.apply(model, reducing(case.layers, key_value=min(frames, 2), group=20)):
        reduced = run(model, clip)
    for name, value in dense.items():
        assert reduced[name].shape == value.shape, name
        assert bool(torch.isfinite(reduced[name]).all()), name


def test_frames_that_a_stride_treats_alike_may_change_places(case: Case, model: nn.Module) -> None:
    # Kept frames 2 and 4 change places, and dropped ones 1 and 3; frame 0 may be the anchor.
    order = [0, 3, 4, 1, 2, 5]
    clip = images(case, 6)
    first = {"ref_view_strategy": "first"} if case.family == "da3" else {}
    with spark3r.apply(model, reducing(case.layers, query=1, key_value=2)):
        output = run(model, clip, **first)
        permuted = run(model, clip[:, order], **first)
    frames = {name: value for name, value in output.items() if value.ndim > 1}
    frames.pop("global_points", None)  # PanoVGGT's are those of the middle frame
    expected = {name: value[:, order] for name, value in frames.items()}
    assert difference({name: permuted[name] for name in frames}, expected) < 1e-4


def test_batch_elements_do_not_see_each_other(case: Case, model: nn.Module) -> None:
    clip = images(case, 5, batch=2)
    with spark3r.apply(model, reducing(case.layers)):
        both = run(model, clip)
        for element in range(2):
            alone = run(model, clip[element : element + 1])
            found = {name: value[element : element + 1] for name, value in both.items()}
            assert difference(found, alone) < 1e-4


def test_copy_of_a_patched_model_stands_alone(case: Case, model: nn.Module) -> None:
    clip = images(case, 5)
    dense = run(model, clip)
    with spark3r.apply(model, reducing(case.layers)):
        reduced = run(model, clip)
        copy = deepcopy(model)
        with torch.no_grad():
            for attn in attentions(copy).values():
                attn.qkv.weight.mul_(0.5)
        assert difference(run(copy, clip), reduced) > 1e-6
        assert difference(run(model, clip), reduced) == 0.0
        spark3r.remove(copy)
        assert spark3r.is_applied(model)
        assert not spark3r.is_applied(copy)
    assert difference(run(model, clip), dense) == 0.0


def test_trains_after_inference(case: Case, model: nn.Module) -> None:
    clip = images(case, 5, rows=3, columns=2)  # nothing of this grid is cached yet
    patched = deepcopy(model)
    rules = reducing(case.layers).layers
    thinned = Operators(QueryMerging(group=4, unmerge="linear"), TokenStride(mass_correction=1.0))
    with spark3r.apply(patched, Schedule(rules, thinned)):
        with torch.inference_mode():
            run(patched, clip)
        patched.train()
        with quiet():
            output = flat(patched(clip))
            read = ("depth", "local_points", "depth_along_ray")
            value = next(output[name] for name in read if name in output)
            value.square().mean().backward()
        for name, attn in attentions(patched).items():
            assert attn.qkv.weight.grad is not None, name
            assert bool(torch.isfinite(attn.qkv.weight.grad).all()), name
            parts = attn.qkv.weight.grad.chunk(3)
            assert all(float(part.abs().max()) > 0 for part in parts), name


def test_dropout_of_the_output_still_happens(case: Case, model: nn.Module) -> None:
    patched = deepcopy(model)
    first = next(iter(attentions(patched).values()))
    if not hasattr(first, "proj_drop"):
        pytest.skip("its attention has no dropout")
    first.proj_drop = nn.Dropout(1.0)
    outputs: list[Tensor] = []
    first.register_forward_hook(lambda attn, args, output: outputs.append(output))
    with spark3r.apply(patched.train(), reducing(case.layers)):
        run(patched, images(case, 5))
    assert float(outputs[0].abs().max()) == 0.0


def test_half_precision_forced_through_our_path(
    case: Case, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = list(attentions(model).values())[-1]
    clip = images(case, 5)

    def tokens() -> Tensor:
        # The parts after global attention are upstream's, and π³'s refuse autocast on a CPU.
        hook = last.register_forward_hook(_stop)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                run(model, clip)
        except _StoppedError as stopped:
            return stopped.output
        finally:
            hook.remove()
        raise AssertionError("the last global attention did not run")

    dense = tokens()
    monkeypatch.setattr(ResolvedRule, "is_dense", property(lambda rule: False))
    with spark3r.apply(model, Schedule.dense(case.layers)):
        assert torch.equal(tokens(), dense)
    monkeypatch.undo()
    with spark3r.apply(model, reducing(case.layers)):
        assert bool(torch.isfinite(tokens()).all())


def test_outputs_become_one_prediction(case: Case, model: nn.Module) -> None:
    clip = images(case, 4)
    predict = detect(model).predict
    assert predict is not None
    with torch.no_grad(), quiet():
        prediction = predict(model(clip), clip[0])
    assert prediction.depth.shape == (4, *clip.shape[-2:])
    assert bool((prediction.depth > 0).all())
    with pytest.raises(spark3r.FamilyError, match="is a head switched off"):
        predict({}, clip[0])


def test_images_smaller_than_a_patch_are_refused(case: Case, model: nn.Module) -> None:
    with (
        spark3r.apply(model, reducing(case.layers)),
        pytest.raises(spark3r.LayoutError, match=r"at least one frame and one patch|multiples"),
    ):
        detect(model).call(model, torch.rand(2, 3, case.patch_size - 1, case.patch_size - 1))


@pytest.mark.parametrize("case", TAKES_CLIP, ids=str)
def test_a_clip_without_batch_dimension_is_refused_or_works(case: Case, model: nn.Module) -> None:
    entry = detect(model).entry(model)
    with (
        spark3r.apply(model, reducing(case.layers)),
        pytest.raises(spark3r.LayoutError, match=r"expected \[B, S, 3, H, W\]"),
    ):
        run(entry, images(case, 3)[0])


@pytest.mark.parametrize("case", TAKES_CLIP, ids=str)
def test_what_is_no_clip_is_named(case: Case, model: nn.Module) -> None:
    entry: Any = detect(model).entry(model)
    with spark3r.apply(model, reducing(case.layers)), torch.no_grad():
        with pytest.raises(spark3r.LayoutError, match="given images of type list, expected a ten"):
            entry([images(case, 3)])
        with pytest.raises(spark3r.LayoutError, match="was given no images, expected a tensor"):
            entry()


def _state(model: nn.Module) -> list[Any]:
    """Return the traces that a patch could leave: attributes, hooks and parameter names."""
    return [
        (name, sorted(map(str, vars(module))), *(len(h) for h in _hooks(module)))
        for name, module in model.named_modules()
    ] + list(model.state_dict())


def _hooks(module: nn.Module) -> tuple[Any, Any]:
    return module._forward_hooks, module._forward_pre_hooks


def _count_calls(monkeypatch: pytest.MonkeyPatch, case: Case) -> list[None]:

    calls: list[None] = []
    reduced_forward = FAMILIES[case.family].reduced_forward

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        return reduced_forward(*args, **kwargs)

    # The record is frozen for users, but a test may replace a field.
    monkeypatch.setitem(FAMILIES[case.family].__dict__, "reduced_forward", counted)
    return calls


class _StoppedError(Exception):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _stop(attn: nn.Module, args: Any, output: Tensor) -> None:
    raise _StoppedError(output)
