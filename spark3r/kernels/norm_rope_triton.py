"""The Triton kernel of `norm_rope`. Importing it needs Triton."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 32
"""Tokens of one program, which reads their table rows once for all heads."""


def launch(
    tokens: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    rows: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Run the kernel; see `norm_rope.apply`. A negative ``eps`` leaves the norm out."""
    batch, heads, length, dim = tokens.shape
    if tokens.stride(3) != 1:
        tokens = tokens.contiguous()
    output = tokens.new_empty((batch, length, heads, dim), dtype=dtype)
    programs = batch * triton.cdiv(length, TOKENS)
    if programs:
        on_device = torch.cuda.device(tokens.device) if tokens.is_cuda else nullcontext()
        with on_device:
            _norm_rope[(programs,)](
                tokens,
                weight,
                bias,
                cos if cos is None else cos.contiguous(),
                sin if sin is None else sin.contiguous(),
                rows,
                output,
                length,
                heads,
                1 if cos is None else cos.shape[0],
                tokens.stride(0),
                tokens.stride(1),
                tokens.stride(2),
                eps,
                NORM=eps >= 0,
                WEIGHT=weight is not None,
                BIAS=bias is not None,
                ROTATE=cos is not None,
                ROWS=rows is not None,
                QUARTER=dim // 4,
                TOKENS=TOKENS,
                enable_fp_fusion=True,
            )
    return output.transpose(1, 2)


@triton.jit
def _norm_rope(  # type: ignore[no-untyped-def]
    tokens,
    weight,
    bias,
    cos,
    sin,
    rows,
    output,
    length,
    heads,
    positions,
    batch_stride,
    head_stride,
    token_stride,
    eps,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ROTATE: tl.constexpr,
    ROWS: tl.constexpr,
    QUARTER: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # A head has four quarters: two that turn with the row of a token, two with its column.
    tiles = tl.cdiv(length, TOKENS)
    program = tl.program_id(0)
    token = (program % tiles) * TOKENS + tl.arange(0, TOKENS)
    inside = token < length
    mask = inside[:, None]
    channel = tl.arange(0, QUARTER)
    # Offsets count in 64 bits: a long clip has more than 2**31 numbers.
    batch = (program // tiles).to(tl.int64)
    token64 = token.to(tl.int64)

    if ROTATE:
        row = token % positions
        if ROWS:
            row = tl.load(rows + token, mask=inside, other=0)
        entry = row.to(tl.int64)[:, None] * (4 * QUARTER) + channel[None, :]
        cos_y = tl.load(cos + entry, mask=mask, other=0.0).to(tl.float32)
        sin_y = tl.load(sin + entry, mask=mask, other=0.0).to(tl.float32)
        cos_x = tl.load(cos + entry + 2 * QUARTER, mask=mask, other=0.0).to(tl.float32)
        sin_x = tl.load(sin + entry + 2 * QUARTER, mask=mask, other=0.0).to(tl.float32)

    source = tokens + batch * batch_stride + token64[:, None] * token_stride + channel[None, :]
    place = (batch * length + token64[:, None]) * heads * (4 * QUARTER) + channel[None, :]
    target = output + place
    for _ in range(heads):
        a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(source + QUARTER, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(source + 2 * QUARTER, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(source + 3 * QUARTER, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            mean = (tl.sum(a + b + c + d, axis=1) / (4 * QUARTER))[:, None]
            a, b, c, d = a - mean, b - mean, c - mean, d - mean
            spread = (tl.sum(a * a + b * b + c * c + d * d, axis=1) / (4 * QUARTER))[:, None]
            scale = 1.0 / tl.sqrt(spread + eps)
            a, b, c, d = a * scale, b * scale, c * scale, d * scale
            if WEIGHT:
                a *= tl.load(weight + channel).to(tl.float32)[None, :]
                b *= tl.load(weight + QUARTER + channel).to(tl.float32)[None, :]
                c *= tl.load(weight + 2 * QUARTER + channel).to(tl.float32)[None, :]
                d *= tl.load(weight + 3 * QUARTER + channel).to(tl.float32)[None, :]
            if BIAS:
                a += tl.load(bias + channel).to(tl.float32)[None, :]
                b += tl.load(bias + QUARTER + channel).to(tl.float32)[None, :]
                c += tl.load(bias + 2 * QUARTER + channel).to(tl.float32)[None, :]
                d += tl.load(bias + 3 * QUARTER + channel).to(tl.float32)[None, :]
        if ROTATE:
            a, b = a * cos_y - b * sin_y, b * cos_y + a * sin_y
            c, d = c * cos_x - d * sin_x, d * cos_x + c * sin_x
        tl.store(target, a.to(output.dtype.element_ty), mask=mask)
        tl.store(target + QUARTER, b.to(output.dtype.element_ty), mask=mask)
        tl.store(target + 2 * QUARTER, c.to(output.dtype.element_ty), mask=mask)
        tl.store(target + 3 * QUARTER, d.to(output.dtype.element_ty), mask=mask)
        source += head_stride
        target += 4 * QUARTER
