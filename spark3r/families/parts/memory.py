"""Wide parts of a model run on a few frames at a time, which lowers peak memory.

A block that attends inside frames, and all of a global block but its attention, give the same
outputs in pieces, and only a piece of their wide intermediates exists at a time. They are matrix
products of many rows, which round the same in pieces. Convolutions round differently and are left
whole. The pieces are of nearly equal size and large enough to fill a GPU. Modules are called whole
where pieces would not help (few frames, gradients) or would change something (training, and a
traced graph, which would unroll the loop).

Autocast keeps the weights that it has cast until it ends, which of a large model is a gigabyte or
two. A pass needs each of them in one block alone, so they are freed when a block is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Replacement, overridden
from .limits import current
from .recognition import names_within, unwrapped

MOST_FRAMES = 16
"""Frames in a piece."""

MOST_TOKENS = 16_384
"""Tokens in a piece, about as many as 16 frames of 518x392 pixels have."""


def most_frames() -> int:
    """Return how many frames a piece of this pass may have."""
    frames = current().frames
    return MOST_FRAMES if frames is None else min(frames, MOST_FRAMES)


def most_tokens() -> int:
    """Return how many tokens a piece of this pass may have."""
    frames = current().frames
    return MOST_TOKENS if frames is None else min(1024 * frames, MOST_TOKENS)


_SPLIT = "_spark3r_split"  # on each module that runs in pieces

_RESIDUAL_USES = frozenset({"norm1", "attn", "ls1", "norm2", "mlp", "ls2"})
_BLOCKS = (
    _RESIDUAL_USES,
    _RESIDUAL_USES
    | {"Tensor", "training", "sample_drop_ratio", "drop_add_residual_stochastic_depth"}
    | {"drop_path1"},
    _RESIDUAL_USES
    | {"Tensor", "training", "sample_drop_ratio", "drop_add_residual_stochastic_depth"}
    | {"drop_path1", "drop_path2"},
    _RESIDUAL_USES
    | {"Tensor", "training", "sample_drop_ratio", "isinstance", "list", "AssertionError", "zip"}
    | {"_forward_list", "cat_keep_shapes", "uncat_with_shapes", "forward_list", "append", "shape"}
    | {"_maybe_index_rope", "index_add", "torch", "randperm", "device", "int", "max"},
    _RESIDUAL_USES | {"drop_path1", "drop_path2", "custom_positional_encoding"},
)
"""What the forward of a block uses: of the stand-ins in the tests; of DINOv2, as VGGT, π³,
Depth-Anything-3 and WorldMirror have it; of PanoVGGT; of DINOv3, as VGGT-Omega has it; of
UniCeption, as MapAnything has it. Other blocks are left alone."""


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


def global_block_in_pieces(block: Any, *passed: str) -> Iterator[Replacement]:
    """Yield the replacements that let all of a global block but its attention run in pieces.

    The block then holds its input and its output and little else that is as long.

    Args:
        block: Block with ``norm1``, ``attn``, ``ls1``, ``norm2``, ``mlp`` and ``ls2``.
        passed: Names under which the block gives its other arguments to ``attn``, in their order;
            none if only MLP and queries are to run in pieces.
    """
    block = unwrapped(block, "attn")
    yield from queries_in_pieces(unwrapped(block.attn, "qkv"))
    yield from by_tokens(block.mlp)
    if passed and names_within(block, "forward", "_forward_list") in _BLOCKS:
        yield from _replacements(block, _block_in_pieces, passed)


def aggregator_in_pieces(
    aggregator: Any, global_blocks: Iterable[Any], *split: str, passed: tuple[str, ...] = ()
) -> Iterator[Replacement]:
    """Yield the replacements that let an aggregator like VGGT's run in pieces.

    Args:
        aggregator: Module with ``patch_embed`` and ``frame_blocks``.
        global_blocks: Blocks that attend over all frames.
        split: Names of the frame blocks' keyword arguments that have all frames first.
        passed: Names that `global_block_in_pieces` takes.
    """
    yield from encoder_by_frames(aggregator.patch_embed)
    for block in aggregator.frame_blocks:
        yield from by_frames(block, *split)
    for block in global_blocks:
        yield from global_block_in_pieces(block, *passed)


def encoder_by_frames(encoder: nn.Module) -> Iterator[Replacement]:
    """Yield the replacements that let an encoder's blocks, if it has any, run in pieces."""
    for block in getattr(encoder, "blocks", ()):
        yield from by_frames(block)


def _frames_in_pieces(self: nn.Module, frames: Any, *args: Any, **kwargs: Any) -> Any:
    listed = isinstance(frames, list)
    count = len(frames[0] if listed else frames)
    forward = type(self).forward
    most = most_frames()
    if runs_whole(self, count, most) or (listed and len(frames) > 1):
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

    output = in_pieces(piece, count, most)
    torch.clear_autocast_cache()
    return [output] if listed else output


def _tokens_in_pieces(self: nn.Module, tokens: Tensor) -> Tensor:
    forward = type(self).forward
    flat, most = tokens.flatten(0, -2), most_tokens()
    if runs_whole(self, len(flat), most):
        return forward(self, tokens)
    output = in_pieces(lambda chosen: forward(self, flat[chosen]), len(flat), most)
    return output.view(*tokens.shape[:-1], -1)


def _block_in_pieces(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    count = x.shape[0] * x.shape[1]
    if runs_whole(self, count, most_tokens()):
        output: Tensor = type(self).forward(self, x, *args, **kwargs)
        return output
    passed = dict(zip(self.__dict__[_SPLIT], args, strict=False))
    stream = _attended(self, x, **passed, **kwargs)

    def updated(some: slice) -> Tensor:
        tokens = stream[some]
        found: Tensor = tokens + self.ls2(self.mlp(self.norm2(tokens)))
        return found

    output = in_pieces(updated, count, most_tokens(), stream).view(*x.shape[:2], -1)
    torch.clear_autocast_cache()
    return output


def _attended(self: Any, x: Tensor, **passed: Any) -> Tensor:
    """Return the tokens ``[B, N, C]`` after a block's attention, as ``[B * N, C]``."""
    before, update = x.flatten(0, 1), self.attn(self.norm1(x), **passed).flatten(0, 1)

    def piece(some: slice) -> Tensor:
        found: Tensor = before[some] + self.ls1(update[some])
        return found

    return in_pieces(piece, len(before), most_tokens())


def runs_whole(module: nn.Module, count: int, most: int) -> bool:
    """Return True if a module of so many frames or tokens runs as its class does."""
    return (
        _SPLIT not in module.__dict__  # a hook still calls what it wrapped while it was patched
        or count <= most
        or module.training
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
    )


def in_pieces(
    piece: Callable[[slice], Tensor], count: int, most: int, whole: Tensor | None = None
) -> Tensor:
    """Return the outputs of all pieces, each written to its final place at once.

    Args:
        piece: Function from a slice of the rows to its output.
        count: Number of rows.
        most: Largest number of rows in a piece.
        whole: Tensor to write to, if its precision is that of the outputs.
    """
    pieces = -(-count // most)
    ends = [count * (i + 1) // pieces for i in range(pieces)]
    for start, end in zip((0, *ends[:-1]), ends, strict=True):
        if start and end < count and whole is not None and whole.device.type == "meta":
            continue  # nothing is computed there, and the first and last piece stand for all
        part = piece(slice(start, end))
        if whole is None or (not start and part.dtype != whole.dtype):
            whole = part.new_empty((count, *part.shape[1:]))
        whole[start:end] = part
    assert whole is not None
    return whole
