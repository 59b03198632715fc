"""Wide parts of a model run on a few frames at a time, which lowers peak memory.

A block that attends inside frames and the MLP of a global block give the same outputs in pieces,
and only a piece of their wide intermediates exists at a time. They are matrix products of many
rows, which round the same in pieces. Convolutions round differently and are left whole. The pieces
are of nearly equal size and large enough to fill a GPU. Modules are called whole where pieces would
not help (few frames, gradients) or would change something (training, and a traced graph, which
would unroll the loop).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Replacement, overridden

MOST_FRAMES = 16
"""Frames in a piece."""

MOST_TOKENS = 16_384
"""Tokens in a piece, about as many as 16 frames of 518x392 pixels have."""

_SPLIT = "_spark3r_split"  # on each module that runs in pieces


def by_frames(module: nn.Module, *split: str) -> list[Replacement]:
    """Return the replacements that let a module run on `MOST_FRAMES` frames at a time.

    Args:
        module: Module whose first argument and output have all frames of all clips along their
            first dimension. Each is a tensor, or a list of one tensor.
        split: Names of the keyword arguments that have the frames there too.

    Returns:
        The replacements; none if the instance has a forward of its own (an offloading hook, say).
    """
    return _replacements(module, _frames_in_pieces, split)


def by_tokens(module: nn.Module) -> list[Replacement]:
    """Return the replacements that let an MLP of ``[..., C]`` run on some tokens at a time."""
    return _replacements(module, _tokens_in_pieces, ())


def _replacements(
    module: nn.Module, forward: Callable[..., Any], split: tuple[str, ...]
) -> list[Replacement]:
    if overridden(module):
        return []
    return [(module, _SPLIT, split), (module, "forward", partial(forward, module))]


def queries_in_pieces(attn: nn.Module) -> list[Replacement]:
    """Return the replacement that lets a reduced layer's queries run on some frames at a time.

    `reduced.reduced_attention` reads it.
    """
    return [(attn, _SPLIT, ())]


def aggregator_in_pieces(
    aggregator: Any, global_blocks: Iterable[Any], *split: str
) -> Iterator[Replacement]:
    """Yield the replacements that let an aggregator like VGGT's run in pieces.

    Args:
        aggregator: Module with ``patch_embed`` and ``frame_blocks``.
        global_blocks: Blocks that attend over all frames. Their MLPs and queries run in pieces.
        split: Names of the frame blocks' keyword arguments that have all frames first.
    """
    yield from encoder_by_frames(aggregator.patch_embed)
    for block in aggregator.frame_blocks:
        yield from by_frames(block, *split)
    for block in global_blocks:
        yield from queries_in_pieces(block.attn)
        yield from by_tokens(block.mlp)


def encoder_by_frames(encoder: nn.Module) -> Iterator[Replacement]:
    """Yield the replacements that let an encoder's blocks, if it has any, run in pieces."""
    for block in getattr(encoder, "blocks", ()):
        yield from by_frames(block)


def _frames_in_pieces(self: nn.Module, frames: Any, *args: Any, **kwargs: Any) -> Any:
    listed = isinstance(frames, list)
    count = len(frames[0] if listed else frames)
    forward = type(self).forward
    if runs_whole(self, count, MOST_FRAMES) or (listed and len(frames) > 1):
        return forward(self, frames, *args, **kwargs)
    split = self.__dict__[_SPLIT]

    def piece(chosen: slice) -> Tensor:
        some = {
            name: value[chosen] if name in split and value is not None else value
            for name, value in kwargs.items()
        }
        if not listed:
            return forward(self, frames[chosen], *args, **some)
        (output,) = forward(self, [frames[0][chosen]], *args, **some)
        return output

    output = in_pieces(piece, count, MOST_FRAMES)
    return [output] if listed else output


def _tokens_in_pieces(self: nn.Module, tokens: Tensor) -> Tensor:
    forward = type(self).forward
    flat = tokens.flatten(0, -2)
    if runs_whole(self, len(flat), MOST_TOKENS):
        return forward(self, tokens)
    output = in_pieces(lambda chosen: forward(self, flat[chosen]), len(flat), MOST_TOKENS)
    return output.view(*tokens.shape[:-1], -1)


def runs_whole(module: nn.Module, count: int, most: int) -> bool:
    """Return True if a module of so many frames or tokens runs as its class does."""
    return (
        _SPLIT not in module.__dict__  # a hook still calls what it wrapped while it was patched
        or count <= most
        or module.training
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
    )


def in_pieces(piece: Callable[[slice], Tensor], count: int, most: int) -> Tensor:
    """Return the outputs of all pieces, each written to its final place at once."""
    pieces = -(-count // most)
    ends = [count * (i + 1) // pieces for i in range(pieces)]
    whole: Tensor | None = None
    for start, end in zip((0, *ends[:-1]), ends, strict=True):
        if whole is not None and whole.device.type == "meta" and end < count:
            continue  # nothing is computed there, and the first and last piece stand for all
        part = piece(slice(start, end))
        if whole is None:
            whole = part.new_empty((count, *part.shape[1:]))
        whole[start:end] = part
    assert whole is not None
    return whole
