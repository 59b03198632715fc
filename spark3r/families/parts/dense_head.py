"""A dense head that goes on from projections of its layers, which were made when layers were done.

A DPT head begins with a norm and a projection of four layers to fewer channels, on some frames at a
time. In passes of a Runner that beginning runs as soon as a layer is there, on the frames that the
head takes together, so that it gives the same bits. The tokens of the layer are then freed. The
head gets a list without numbers and goes on from the stored projections.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..base import overridden
from .limits import current, kept_features, kept_output, read_features
from .recognition import arguments, has, names_used

Maps = list[list[Tensor]]
"""Of each layer, its projections ``[frames, channels, h, w]``, in pieces of the frames that the
head takes together."""


def is_known(head: Any, expected: tuple[str, ...], begins: tuple[str, ...]) -> bool:
    """Return True if a dense head begins as `project` does, with the methods of its class.

    Args:
        head: The head, or None.
        expected: Names of the arguments of its forward.
        begins: Names that it uses first for a piece of the frames, in this order.
    """
    return (
        head is not None
        and has(head, "norm", "projects", "_forward_impl", "intermediate_layer_idx")
        and arguments(head) == expected
        and names_used(head, "_forward_impl")[: len(begins)] == begins
        and not overridden(head)
        and not overridden(head, "_forward_impl")
    )


def frames_at_once(head: Any, argument: str, frames: int) -> int:
    """Return how many frames a head takes together unless its caller says otherwise.

    It is the head's own default, or `Limits.head_frames` if that is less.

    Args:
        head: The head.
        argument: Name of the argument that says how many.
        frames: Length of the clip, which an argument of None stands for.
    """
    found: int | None = inspect.signature(type(head).forward).parameters[argument].default
    found = min(frames, found or frames)
    return min(found, current().head_frames or found)


def with_limit(kwargs: dict[str, Any], head: Any, argument: str) -> dict[str, Any]:
    """Return the keyword arguments of a head's forward, by which it takes `frames_at_once`."""
    most = current().head_frames
    if most is None:
        return kwargs
    return {argument: frames_at_once(head, argument, most), **kwargs}


def project(
    head: Any,
    stage: int,
    patches_of: Callable[[slice], Tensor],
    frames: int,
    at_once: int,
    size: Sequence[int],
    device: str,
) -> list[Tensor]:
    """Return a layer's projections as a dense head begins with them, piece by piece.

    Args:
        head: The head.
        stage: Number of the layer among those that the head reads.
        patches_of: Function from some frames to their patch tokens ``[n, h * w, 2C]``.
        frames: Number of frames.
        at_once: Frames in a piece.
        size: Height and width of the images in pixels.
        device: Type of the device for which the model switches autocast off around its heads.
    """
    height, width = (side // head.patch_size for side in size)
    found: list[Tensor] = []
    starts = range(0, frames, at_once)
    for first in starts:
        if found and found[0].device.type == "meta" and first < starts[-1]:
            found.append(torch.empty_like(found[0]))  # as in `memory.in_pieces`
            continue
        patches = patches_of(slice(first, min(first + at_once, frames)))
        with torch.autocast(device, enabled=False):
            patches = head.norm(patches).permute(0, 2, 1)
            found.append(kept_features(head.projects[stage](patches.unflatten(2, (height, width)))))
    return found


class Begun:
    """A dense head whose norms and projections have run: in its forward it stands for the head.

    Args:
        head: The head.
        maps: What `project` returned of each layer that it reads.
    """

    def __init__(self, head: Any, maps: Maps) -> None:
        self._head = head
        self._maps = [deque(each) for each in maps]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)

    def _forward_impl(self, feats: Sequence[Tensor], *args: Any) -> Any:
        """Run the head on the frames of one piece, and free their projections."""
        device = next(self._head.parameters()).device
        maps = [read_features(each.popleft(), device) for each in self._maps]
        output = type(self._head)._forward_impl(_BegunPiece(self._head, maps), feats, *args)
        return tree_map_only(Tensor, kept_output, output)


class _BegunPiece:
    """A dense head in the place of itself for the frames of one piece."""

    def __init__(self, head: Any, maps: list[Tensor]) -> None:
        self._head = head
        self.norm = lambda tokens: tokens
        self.projects = [lambda _, found=each: found for each in maps]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)
