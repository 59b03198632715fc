"""Stages of a GPU run that need no model: ceilings, attention kernels, single steps of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from gpu_session import MASS, Session, attention_kernel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spark3r.env import environment, kernels
from spark3r.kernels import forced, grouped_attention, nearest, norm_rope
from spark3r.kernels.grouped_attention import Group
from spark3r.reduction import merging
from spark3r.reduction.operators import Operators
from spark3r.reduction.plans import key_value_length, plan, query_length, select
from spark3r.reduction.rule import ResolvedRule
from spark3r.rope import make_rope

HEADS, DIM = 16, 64
WIDTH = HEADS * DIM

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
PAPER_RULES = (ResolvedRule(4, 25), ResolvedRule(4, 75))
MASS_RULES = (ResolvedRule(4, 25, MASS), ResolvedRule(4, 75, MASS))
TINY_PAPER_RULES, TINY_MASS_RULES = (ResolvedRule(4, 8),), (ResolvedRule(4, 4, MASS),)

CHECKED_ROWS = 256
"""Last rows of the queries, which are compared with float64. They lie beyond 2**16 rows, where an
offset of 32 bits would show."""


def env(session: Session) -> None:
    put, on_cuda = session.lines.put, session.on_cuda
    card = torch.cuda.get_device_properties(session.device) if on_cuda else None
    order = getattr(torch._C, "_get_sdp_priority_order", lambda: None)
    put(
        "environment",
        **environment(),
        cudnn=torch.backends.cudnn.version(),
        card=str(card),
        memory_gb=None if card is None else round(card.total_memory / 1e9, 2),
        sdpa_order=str(order()),
    )
    with session.lines.guarded("kernels"):
        put("kernels", kernels=kernels())
    side = 256 if session.tiny else 8192
    a, b = session.random(side, side), session.random(side, side)
    with session.lines.guarded("product"):
        put("product", tflops=round(2 * side**3 / session.ms(lambda: a @ b) / 1e9, 2))
    source = torch.empty(2**20 if session.tiny else 2**32, dtype=torch.uint8, device=session.device)
    with session.lines.guarded("copy"):
        target = torch.empty_like(source)
        ms = session.ms(lambda: target.copy_(source))
        put("copy", tb_per_s=round(2 * source.numel() / ms / 1e9, 3))
    small = session.random(64, 64)

    def launches() -> None:
        for _ in range(1000):
            small.add_(1)

    with session.lines.guarded("launch"):
        put("launch", us=round(session.ms(launches), 2))


def sdpa(session: Session) -> None:
    layout, tiny = session.layout, session.tiny
    with torch.inference_mode():
        for rule in TINY_MASS_RULES if tiny else MASS_RULES:
            selection = select(layout, rule, session.device, by_group=True)
            assert selection is not None
            _mass(session, query_length(layout, rule), selection.length, selection.groups)
        for rule in TINY_PAPER_RULES if tiny else PAPER_RULES:
            queries, keys = query_length(layout, rule), key_value_length(layout, rule)
            _plain(session, "attention", queries, keys)
        # Dense attention costs the same for every query, so a part of them stands for all.
        _plain(session, "dense layer", 64 if tiny else 65_536, layout.tokens, checked=16)


def preferring(kernel: str) -> AbstractContextManager[object]:
    """Allow one kernel in whole passes, and others where it cannot run, as in float32."""
    if kernel == "default":
        return nullcontext()
    return sdpa_kernel([KERNELS[kernel], SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _allowed(kernel: str) -> AbstractContextManager[object]:
    return nullcontext() if kernel == "default" else sdpa_kernel([KERNELS[kernel]])


def _names(session: Session) -> Sequence[str]:
    return ("default", *KERNELS) if session.on_cuda else ("default",)


def _inputs(session: Session, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values ``[1, H, N, D]`` with the strides of a pass."""
    query = session.random(1, queries, HEADS, DIM).transpose(1, 2)
    key, value = session.random(1, keys, 2, HEADS, DIM).permute(2, 0, 3, 1, 4)
    return query, key, value


def _plain(
    session: Session, figure: str, queries: int, keys: int, checked: int = CHECKED_ROWS
) -> None:
    """Time attention without a bias by each kernel."""
    query, key, value = _inputs(session, queries, keys)
    exact = _exact(query[:, :, -checked:], key, value, None)
    for name in _names(session):

        def call(name: str = name) -> Tensor:
            with _allowed(name):
                return F.scaled_dot_product_attention(query, key, value)

        _time(session, figure, name, None, call, (queries, keys), exact)


def _mass(session: Session, queries: int, keys: int, groups: Sequence[Group]) -> None:
    """Time mass correction: groups joined by each kernel, our mask, and one mask by each kernel."""
    query, key, value = _inputs(session, queries, keys)
    bias = torch.cat([torch.full((count,), each) for _, count, each in groups])
    mask = bias.to(session.device, session.dtype)
    exact = _exact(query[:, :, -CHECKED_ROWS:], key, value, bias.to(session.device).double())
    for name in KERNELS if session.on_cuda else ("flash",):
        join = partial(grouped_attention.attend, query, key, value, groups, name)
        _time(session, "attention", name, "joined", join, (queries, keys), exact)
    for name in _names(session):
        if name == "flash":
            continue  # it takes no mask

        def masked(name: str = name) -> Tensor:
            with _allowed(name):
                if name == "default":  # as a pass calls it, in pieces below 2**31
                    return grouped_attention.masked(query, key, value, mask)
                one = mask.view(1, 1, 1, -1)
                return F.scaled_dot_product_attention(query, key, value, attn_mask=one)

        _time(session, "attention", name, "masked", masked, (queries, keys), exact)


def _exact(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Return attention in float64, without a fused kernel."""
    logits = query.double() @ key.double().transpose(2, 3) / math.sqrt(DIM)
    if bias is not None:
        logits += bias
    return logits.softmax(dim=3) @ value.double()


def _time(
    session: Session,
    figure: str,
    kernel: str,
    mass: str | None,
    call: Callable[[], Tensor],
    lengths: tuple[int, int],
    exact: Tensor,
) -> None:
    """Write time, error of the last rows, and the kernel that ran."""
    queries, keys = lengths
    what = {"queries": queries, "keys": keys, "kernel": kernel, "mass": mass}
    with session.lines.guarded(figure, **what):
        cold_ms = session.ms(call, rounds=1, warm=0)
        output = call()
        wrong = output[:, :, -exact.shape[2] :].double() - exact
        error = float(wrong.abs().max() / exact.abs().max())
        del output
        ms = session.ms(call, rounds=2, warm=0)
        session.lines.put(
            figure,
            **what,
            ms=ms,
            cold_ms=cold_ms,
            tflops=round(4 * queries * keys * WIDTH / ms / 1e9, 1),
            largest_error=error,
            ran=attention_kernel(call, session.on_cuda),
        )


def ops(session: Session) -> None:
    with torch.inference_mode():
        _twins(session)
        _matching(session)
        _merging(session)
        _elementwise(session)


def _twins(session: Session) -> None:
    """Time norm, rotary embedding and cast of all queries, fused and step by step."""
    layout = session.layout
    norm = nn.LayerNorm(DIM).to(session.device)
    height, width, special = layout.height, layout.width, layout.special
    rope = make_rope(height, width, special, DIM, session.device)
    tokens = session.frames(layout.frames, 4) * layout.tokens_per_frame
    qkv = session.random(1, tokens, 3, HEADS, DIM)
    query = qkv[:, :, 0].transpose(1, 2)
    args = norm, rope, None, session.dtype
    autocast = torch.autocast(session.device.type, torch.bfloat16, enabled=session.on_cuda)

    def plain() -> Tensor:
        with autocast:
            return norm_rope.plain(query, *args)

    def fused() -> Tensor:
        return norm_rope.apply(query, *args)

    with session.lines.guarded("twins", operation=norm_rope.OPERATION):
        plain_ms = session.ms(plain)
        expected = plain()
        with forced(norm_rope.OPERATION, norm_rope.TRITON):
            norm_rope.implementation(session.device, session.dtype, DIM)  # defines the operator
        difference = float((fused() - expected).abs().max() / expected.abs().max())
        del expected
        session.lines.put(
            "twins",
            operation=norm_rope.OPERATION,
            plain_ms=plain_ms,
            fused_ms=session.ms(fused),
            difference=difference,
        )


def _queries(session: Session, frames: int | None = None) -> Tensor:
    """Return queries ``[1, H, N, D]`` as the fused kernel leaves them."""
    layout = session.layout
    frames = layout.frames if frames is None else frames
    return session.random(1, frames * layout.tokens_per_frame, HEADS, DIM).transpose(1, 2)


def _matching(session: Session) -> None:
    """Time matching fused, and plain at several bounds with and without TF32."""
    rule, layout = ResolvedRule(4), session.layout
    query = _queries(session)
    merge_plan = plan(layout, rule, session.device)
    assert merge_plan is not None
    what = {"operation": "matching"}
    with forced(nearest.OPERATION, nearest.PLAIN):
        with session.lines.guarded("twins", **what):
            plain_ms = session.ms(lambda: merging.match(query, merge_plan))
            expected = merging.match(query, merge_plan)
        with session.lines.guarded("twins", **what), forced(nearest.OPERATION, nearest.TRITON):
            same = merging.match(query, merge_plan) == expected
            fused_ms = session.ms(lambda: merging.match(query, merge_plan))
            session.lines.put(
                "twins",
                **what,
                plain_ms=plain_ms,
                fused_ms=fused_ms,
                difference=1 - float(same.float().mean()),
            )
    for power in (26, 27, 28):
        for tf32 in (False, True):
            name = f"matching, plain, 2^{power} at once" + (", TF32" if tf32 else "")
            what = {"operation": name}

            def search(source: Tensor, found: Tensor, count: int, power: int = power) -> Tensor:
                return merging.nearest(source, found, count, 2**power)

            with session.lines.guarded("operation", **what):
                torch.backends.cuda.matmul.allow_tf32 = tf32
                call = partial(merging.match, query, merge_plan, merging.head_mean, search)
                session.lines.put("operation", **what, ms=session.ms(call))
    torch.backends.cuda.matmul.allow_tf32 = False
    with session.lines.guarded("same places"):
        frames = min(20, layout.frames)
        few = type(layout)(frames, layout.height, layout.width, layout.special, anchor_frame=0)
        some = _queries(session, frames).float()
        places = []
        for where in (session.device, torch.device("cpu")):
            own = plan(few, rule, where)
            assert own is not None
            places.append(merging.match(some.to(where), own).cpu())
        share = float((places[0] == places[1]).float().mean())
        session.lines.put("same places", frames=frames, share=share)


def _merging(session: Session) -> None:
    """Time merging and unmerging, and see whether merging repeats."""
    operators = Operators()
    merge_plan = plan(session.layout, ResolvedRule(4), session.device)
    assert merge_plan is not None
    kept = merge_plan.kept.shape[0]
    query = _queries(session)
    with session.lines.guarded("operation", operation="merging"):
        places = merging.match(query, merge_plan)
        for dtype in (session.dtype, torch.float32):
            cast = query.to(dtype)
            merged = merging.merge(cast, places, kept)
            session.lines.put(
                "operation",
                operation="merging",
                dtype=str(dtype),
                ms=session.ms(partial(merging.merge, cast, places, kept)),
                repeats=torch.equal(merged, merging.merge(cast, places, kept)),
            )
        output = merging.merge(query, places, kept)
        unmerge = operators.query.unmerging.unmerge
        call = partial(unmerge, query, output, output, places, merge_plan)
        session.lines.put("operation", operation="unmerging by copies", ms=session.ms(call))
    with session.lines.guarded("operation", operation="keys taken"):
        tokens = session.random(1, session.layout.tokens, WIDTH)
        factor = 4 if session.tiny else 25
        selection = select(session.layout, ResolvedRule(1, factor, MASS), session.device)
        assert selection is not None
        ms = session.ms(lambda: selection.take(tokens))
        session.lines.put("operation", operation="keys taken", ms=ms)


def _elementwise(session: Session) -> None:
    """Time products, norms and casts of a layer."""
    tokens = session.layout.tokens
    piece = min(16, session.layout.frames) * session.layout.tokens_per_frame
    x = session.random(1, tokens, WIDTH)
    single = x.float()
    weight = session.random(4 * WIDTH, WIDTH)
    wide = session.random(1, piece, 4 * WIDTH)
    back = weight.t().contiguous()
    norm, head_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(DIM)
    for module in (norm, head_norm):
        module.to(session.device)
    by_head = single.unflatten(2, (HEADS, DIM)).transpose(1, 2)
    calls: dict[str, Callable[[], object]] = {
        "linear C to C": lambda: F.linear(x, weight[:WIDTH]),
        "linear C to 4C, 16 frames": lambda: F.linear(x[:, :piece], weight),
        "linear 4C to C, 16 frames": lambda: F.linear(wide, back),
        "layer norm of C in float32": lambda: norm(single),
        "layer norm of 64, strided": lambda: head_norm(by_head),
        "cast from float32": lambda: single.to(session.dtype),
        "GELU of 4C, 16 frames": lambda: F.gelu(wide),
        "residual in float32": lambda: single + x,
    }
    for name, call in calls.items():
        with session.lines.guarded("operation", operation=name):
            session.lines.put("operation", operation=name, ms=session.ms(call))
