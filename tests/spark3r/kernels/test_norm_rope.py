"""The fused norm, rotation and cast against the plain steps, under Triton's interpreter."""

from __future__ import annotations

import interpreted  # noqa: F401
import pytest
import torch
from torch import Tensor, nn

from spark3r.kernels import forced, norm_rope
from spark3r.kernels.norm_rope import OPERATION, TRITON, apply, plain
from spark3r.rope import Rope

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _triton() -> object:
    with forced(OPERATION, TRITON), torch.no_grad():
        assert norm_rope.implementation(CPU, F32, 64) == TRITON
        yield


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _norm(dim: int, dtype: torch.dtype = F32, *, affine: bool = True) -> nn.LayerNorm:
    norm = nn.LayerNorm(dim, elementwise_affine=affine)
    if affine:
        norm.weight.copy_(1 + 0.3 * _random(dim, seed=1))
        norm.bias.copy_(_random(dim, seed=2))
    return norm.to(dtype)


def _rope(positions: int, dim: int, dtype: torch.dtype = F32) -> Rope:
    angle = _random(positions, 2, 1, dim // 4, seed=3).expand(-1, -1, 2, -1).flatten(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _exact(
    tokens: Tensor, norm: nn.LayerNorm | None, rope: Rope | None, rows: Tensor | None
) -> Tensor:
    double = None if norm is None else nn.LayerNorm(norm.normalized_shape, norm.eps).double()
    if double is not None and norm is not None and norm.weight is not None:
        double.load_state_dict(norm.state_dict())
    tables = None if rope is None else (rope[0].double(), rope[1].double())
    return plain(tokens.double(), double, tables, rows, torch.float64)


@pytest.mark.parametrize(("length", "positions"), [(1, 7), (31, 1), (32, 32), (33, 200), (71, 7)])
def test_any_length_and_number_of_positions(length: int, positions: int) -> None:
    tokens = _random(2, length, 2, 64).transpose(1, 2)
    norm, rope = _norm(64), _rope(positions, 64)
    found = apply(tokens, norm, rope, None, F32)
    assert found.shape == tokens.shape
    assert found.transpose(1, 2).is_contiguous()
    assert (found - _exact(tokens, norm, rope, None)).abs().max() < 5e-6


@pytest.mark.parametrize(
    ("dim", "dtype", "out", "tables"),
    [
        (16, F32, F32, F32),
        (64, BF16, BF16, F32),
        (64, BF16, BF16, BF16),
        (32, F16, F16, F32),
        (128, F32, BF16, F32),
    ],
)
def test_any_head_size_and_precision(
    dim: int, dtype: torch.dtype, out: torch.dtype, tables: torch.dtype
) -> None:
    tokens = _random(1, 35, 1, dim).to(dtype).transpose(1, 2)
    norm, rope = _norm(dim, tables), _rope(37, dim, tables)
    found = apply(tokens, norm, rope, None, out)
    assert found.dtype == out
    exact = _exact(tokens, norm, rope, None)
    one = torch.finfo(out).eps
    # One rounding of the result; the interpreter's bfloat16 is cut off and not rounded.
    assert ((found.double() - exact).abs() <= one * exact.abs() + 5e-6).all()


def test_indexed_rows_and_a_batch() -> None:
    tokens = _random(2, 2, 33, 32)
    norm, rope = _norm(32), _rope(9, 32)
    rows = torch.randint(9, (33,), generator=torch.Generator().manual_seed(4))
    found = apply(tokens, norm, rope, rows, F32)
    assert (found - _exact(tokens, norm, rope, rows)).abs().max() < 5e-6


@pytest.mark.parametrize("strides", ["fused projection", "every third token", "last not 1"])
def test_any_strides(strides: str) -> None:
    if strides == "fused projection":
        tokens = _random(2, 35, 3, 2, 32)[:, :, 1].transpose(1, 2)
    elif strides == "every third token":
        tokens = _random(1, 2, 105, 32)[:, :, ::3]
    else:
        tokens = _random(1, 2, 32, 35).transpose(2, 3)
    norm, rope = _norm(32), _rope(11, 32)
    before = tokens.clone()
    found = apply(tokens, norm, rope, None, F32)
    assert torch.equal(tokens, before)
    assert (found - _exact(tokens, norm, rope, None)).abs().max() < 5e-6


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
def test_norm_without_parameters_norm_alone_and_rotation_alone(affine: bool, rotated: bool) -> None:
    tokens = _random(1, 2, 19, 32)
    norm, rope = _norm(32, affine=affine), _rope(19, 32) if rotated else None
    found = apply(tokens, norm, rope, None, F32)
    assert (found - _exact(tokens, norm, rope, None)).abs().max() < 5e-6
    alone = apply(tokens, None, rope, None, F32)
    assert (alone - _exact(tokens, None, rope, None)).abs().max() < 5e-6


def test_no_tokens_make_no_output() -> None:
    assert apply(_random(1, 2, 0, 32), _norm(32), _rope(5, 32), None, F32).shape == (1, 2, 0, 32)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_trial_accepts_the_kernel(dtype: torch.dtype) -> None:
    assert norm_rope._trial(TRITON, CPU, dtype, 64) is None


@pytest.mark.parametrize("mistake", ["rows", "norm", "axes", "bias"])
def test_the_trial_refuses_a_kernel_that_is_wrong(
    mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(
        tokens: Tensor,
        norm: nn.LayerNorm | None,
        rope: Rope | None,
        rows: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        assert norm is not None
        assert rope is not None
        if mistake == "rows":
            rows = None if rows is None else rows.roll(1)
        elif mistake == "norm":
            tokens = tokens - 3
            norm = nn.LayerNorm(norm.normalized_shape, eps=1.0).to(norm.weight.dtype)
        elif mistake == "axes":
            rope = (rope[0].roll(rope[0].shape[1] // 2, 1), rope[1])
        else:
            norm.bias.zero_()
        return plain(tokens.to(norm.weight.dtype), norm, rope, rows, dtype)

    monkeypatch.setattr(norm_rope, "apply", wrong)
    for dtype in (F32, BF16):
        reason = norm_rope._trial(TRITON, CPU, dtype, 64)
        assert reason is not None
        assert "differs from the plain result" in reason


def test_other_head_sizes_stay_plain() -> None:
    assert [dim for dim in range(1, 130) if norm_rope.is_covered_size(dim)] == [
        4, 8, 16, 32, 64, 128,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.dynamo
def test_the_kernel_is_one_operator_of_a_compiled_graph() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    norm, rope = _norm(32), _rope(11, 32)

    def run(tokens: Tensor) -> Tensor:
        if norm_rope.implementation(tokens.device, F32, 32) != TRITON:
            return tokens
        return apply(tokens, norm, rope, None, F32) + 1

    for backend in ("eager", "aot_eager"):
        tokens = _random(2, 40, 3, 4, 32)[:, :, 1].transpose(1, 2)
        compiled = torch.compile(run, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(tokens), run(tokens))
        torch._dynamo.reset()
