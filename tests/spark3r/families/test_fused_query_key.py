"""The fused norm and rotation inside the families, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import interpreted  # noqa: F401
import pytest
import torch
from family_cases import CASES, Case, build, difference, images, reducing, run
from torch import Tensor

import spark3r
from spark3r import Schedule
from spark3r.families.registry import detect
from spark3r.kernels import forced, norm_rope
from spark3r.kernels.norm_rope import OPERATION, TRITON

# MapAnything's queries and keys have neither a norm nor positions. The rotary embeddings of
# WorldMirror 2, and of VGGT-Omega's frame blocks, are of other kinds. WorldMirror 2 itself runs
# kernels of its own inside frames.
UNFUSED = ("worldmirror-stand-in", "worldmirror-upstream")
FUSED = [case for case in CASES if case.family != "mapanything" and case.name not in UNFUSED]
OWN_FRAMES = ("omega-stand-in", "omega-upstream", "worldmirror-1-upstream")
FUSED_FRAMES = [case for case in FUSED if case.name not in OWN_FRAMES]

# The interpreter takes seconds for a pass. These two differ most.
FAST = ("vggt-stand-in", "omega-stand-in")


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Record the shapes that the fused kernel was called with."""
    shapes: list[tuple[int, ...]] = []
    original = norm_rope.apply

    def note(tokens: Tensor, *rest: Any) -> Tensor:
        shapes.append(tuple(tokens.shape))
        return original(tokens, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(norm_rope, "apply", note)
        yield shapes


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=() if case.name in FAST else pytest.mark.slow)
        for case in FUSED
    ],
)
def test_the_kernel_gives_the_results_of_the_plain_steps(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clip = build(case), images(case, 3)
    with spark3r.apply(model, reducing(case.layers)):
        plain = run(model, clip)
        with forced(OPERATION, TRITON), counted(monkeypatch) as shapes:
            fused = run(model, clip)
    assert difference(fused, plain) < 2e-4
    frames = sum(shape[0] == 3 for shape in shapes)
    assert len(shapes) - frames == 2 * case.layers  # queries and keys of each global layer
    assert (frames > 0) == (case in FUSED_FRAMES)


@pytest.mark.parametrize("case", FUSED_FRAMES, ids=str)
def test_passes_that_reduce_nothing_stay_dense_bit_for_bit(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clip = build(case), images(case, 3)
    dense = run(model, clip)
    with forced(OPERATION, TRITON), counted(monkeypatch) as shapes:
        with spark3r.apply(model, Schedule.dense(case.layers)):
            assert difference(run(model, clip), dense) == 0.0
        with spark3r.apply(model, reducing(case.layers)) as handle, handle.disabled():
            assert difference(run(model, clip), dense) == 0.0
    assert shapes == []
    assert difference(run(model, clip), dense) == 0.0


@pytest.mark.parametrize("case", FUSED_FRAMES, ids=str)
def test_gradients_take_the_plain_steps(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clip = build(case), images(case, 3)
    entry = detect(model).entry(model)
    with spark3r.apply(model, reducing(case.layers)), counted(monkeypatch) as shapes:
        expected = entry(clip)
        with forced(OPERATION, TRITON):
            found = entry(clip)
    assert shapes == []
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (found, expected)), strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.dynamo
@pytest.mark.parametrize("case", [case for case in FUSED_FRAMES if not case.needs], ids=str)
def test_a_model_with_the_kernel_compiles_without_a_graph_break(case: Case) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    model, clip = build(case), images(case, 3)
    entry = detect(model).entry(model)
    # Unread tokens are kept, because a graph drops them in another form.
    handle = spark3r.apply(model, reducing(case.layers), save_memory=False)
    with handle, torch.no_grad(), forced(OPERATION, TRITON):
        expected = torch.utils._pytree.tree_leaves(entry(clip))
        compiled = torch.compile(entry, fullgraph=True, backend="eager")
        found = torch.utils._pytree.tree_leaves(compiled(clip))
    torch._dynamo.reset()
    for a, b in zip(found, expected, strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)
