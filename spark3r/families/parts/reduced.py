"""A reduced global attention layer, from hidden states to its output projection.

On a long clip the query side runs in pieces of whole merging groups (`reduction.pieces`), if the
memory savers are on. It runs whole where gradients are recorded, in training, and in a traced
graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...layout import TokenLayout
from ...reduction.attention import attend
from ...reduction.gathering import Keys
from ...reduction.pieces import Piece, attend_in_pieces, pieces
from ...reduction.plans import select
from ...reduction.pruning import KeySelection
from ...reduction.rule import ResolvedRule
from . import memory
from .projection import join, project_all, project_kept, project_queries
from .query_key import Where


class Prepare(Protocol):
    """Norm, rotary embedding and precision, as `query_key.normalise_and_rotate` does them."""

    def __call__(
        self,
        norm: nn.Module | None,
        make: Callable[[], Tensor],
        where: Where,
        dtype: torch.dtype,
        /,
    ) -> Tensor:
        """Return queries or keys as attention takes them, ``[B, H, n, D]``."""


Around = Callable[[Tensor, KeySelection | None], AbstractContextManager[None]]
"""From values and selection to the context in which attention runs."""


def _nothing(value: Tensor, selection: KeySelection | None) -> AbstractContextManager[None]:
    return nullcontext()


def reduced_attention(
    attn: Any,
    layout: TokenLayout,
    rule: ResolvedRule,
    x: Tensor,
    prepare: Prepare,
    around: Around = _nothing,
) -> Tensor:
    """Return the output ``[B, N, C]`` of a layer with a fused ``qkv``, after its projection.

    Args:
        attn: Module with ``qkv``, ``q_norm``, ``k_norm``, ``num_heads`` and ``proj``; its
            ``proj_drop`` comes last if it has one.
        layout: Token layout of the N tokens.
        rule: Rule of the layer in this pass.
        x: Hidden states ``[B, N, C]``.
        prepare: Function that prepares queries and keys for attention.
        around: Function to the context in which attention runs.
    """

    def finish(output: Tensor) -> Tensor:
        projected: Tensor = attn.proj(join(output))
        drop = getattr(attn, "proj_drop", None)  # some forks have none
        return projected if drop is None else drop(projected)

    selection = select(layout, rule, x.device, tokens=x)
    if selection is None:
        projected, projected_key, value = project_all(attn, x)
        query = prepare(attn.q_norm, lambda: projected, None, value.dtype)
        key = prepare(attn.k_norm, lambda: projected_key, None, value.dtype)
        keys = Keys(key, value, layout, rule, None)
    else:
        projected_key, value = project_kept(attn, selection.take(x))
        key = prepare(attn.k_norm, lambda: projected_key, selection, value.dtype)
        keys = Keys(key, value, layout, rule, selection)
        parts = _pieces(attn, layout, rule, x)
        if parts:
            project = project_queries(attn, value.dtype)

            def query_of(tokens: slice) -> Tensor:
                some = x[:, tokens].contiguous()
                return prepare(attn.q_norm, lambda: project(some), tokens, value.dtype)

            with around(value, keys.selection):
                return attend_in_pieces(parts, query_of, finish, keys, layout, rule)
        query = prepare(attn.q_norm, lambda: project_queries(attn)(x), None, value.dtype)
    key, value = keys.take()
    with around(value, keys.selection):
        output = attend(query, key, value, layout, rule, keys.selection)
    return finish(output)


def _pieces(
    attn: nn.Module, layout: TokenLayout, rule: ResolvedRule, x: Tensor
) -> tuple[Piece, ...]:
    most = memory.most_tokens()
    if memory.runs_whole(attn, x.shape[0] * x.shape[1], most):
        return ()
    return pieces(layout, rule, max(1, most // x.shape[0]))
