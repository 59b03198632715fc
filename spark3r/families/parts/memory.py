"""Wide parts of a model on a few frames at a time, for memory.

A block that attends inside frames and the MLP of a global block give the same outputs in pieces,
and only a piece of their wide intermediates exists at a time. They are matrix products of many
rows, which round alike in pieces; convolutions do not, and are left whole. The pieces are of
nearly equal size and large enough to fill a GPU. Modules are called whole where pieces would bring
nothing (few frames, gradients) or change something (training; a traced graph, which would unroll
them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Replacement

MOST_FRAMES = 16  # at a time
MOST_TOKENS = 16_384  # at a time, about as many as 16 frames of 518x392 pixels have

_SPLIT = "_spark3r_split"


def by_frames(module: nn.Module, *split: str) -> list[Replacement]:
    """Return what makes a module run on `MOST_FRAMES` frames at a time.

    Args:
        module: Its first argument and its output, a tensor or a list of one each, have all frames
            of all clips along their first dimension.
        split: Keyword arguments that do too.

    Returns:
        Nothing if the module has a forward of its own already (an offloading hook, say).
    """
    if "forward" in module.__dict__:
        return []
    return [
        (module, _SPLIT, split),
        (module, "forward", MethodType(_frames_in_pieces, module)),
    ]


def by_tokens(module: nn.Module) -> list[Replacement]:
    """Return what makes an MLP of hidden states ``[..., C]`` run on some tokens at a time."""
    if "forward" in module.__dict__:
        return []
    return [(module, "forward", MethodType(_tokens_in_pieces, module))]


def aggregator_in_pieces(
    aggregator: Any, global_blocks: Iterable[Any], *split: str
) -> Iterator[Replacement]:
    """Yield what makes an aggregator like VGGT's run in pieces.

    Args:
        aggregator: Has ``patch_embed`` and ``frame_blocks``.
        global_blocks: Its blocks that attend over all frames, of which only the MLP is cut.
        split: Keyword arguments of the frame blocks that have all frames first.
    """
    yield from encoder_by_frames(aggregator.patch_embed)
    for block in aggregator.frame_blocks:
        yield from by_frames(block, *split)
    for block in global_blocks:
        yield from by_tokens(block.mlp)


def encoder_by_frames(encoder: nn.Module) -> Iterator[Replacement]:
    """Yield what makes the blocks of an encoder run in pieces; one without blocks stays whole."""
    for block in getattr(encoder, "blocks", ()):
        yield from by_frames(block)


def _frames_in_pieces(self: nn.Module, frames: Any, *args: Any, **kwargs: Any) -> Any:
    listed = isinstance(frames, list)
    count = len(frames[0] if listed else frames)
    forward = type(self).forward
    if _whole(self, count, MOST_FRAMES) or (listed and len(frames) > 1):
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

    output = _in_pieces(piece, count, MOST_FRAMES)
    return [output] if listed else output


def _tokens_in_pieces(self: nn.Module, tokens: Tensor) -> Tensor:
    forward = type(self).forward
    flat = tokens.flatten(0, -2)
    if _whole(self, len(flat), MOST_TOKENS):
        return forward(self, tokens)
    output = _in_pieces(lambda chosen: forward(self, flat[chosen]), len(flat), MOST_TOKENS)
    return output.view(*tokens.shape[:-1], -1)


def _whole(module: nn.Module, count: int, most: int) -> bool:
    return (
        count <= most or module.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
    )


def _in_pieces(piece: Callable[[slice], Tensor], count: int, most: int) -> Tensor:
    """Return the outputs of all pieces together, written where they stay."""
    pieces = -(-count // most)
    ends = [count * (i + 1) // pieces for i in range(pieces)]
    whole: Tensor | None = None
    for start, end in zip((0, *ends[:-1]), ends, strict=True):
        part = piece(slice(start, end))
        if whole is None:
            whole = part.new_empty((count, *part.shape[1:]))
        whole[start:end] = part
    assert whole is not None
    return whole
