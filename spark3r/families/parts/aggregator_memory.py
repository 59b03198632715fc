"""Memory savers of an aggregator like VGGT's or VGGT-Omega's: what nothing reads is freed.

Upstream's forward holds the normalised images and the encoder's output until it returns, and keeps
frame and global tokens of layers side by side, ``[B, S, P, 2C]`` in float32. The loop over the
blocks that replaces it frees what it no longer needs, and keeps no layer that no head reads: in
their place stand tokens without numbers (`Dropped`).

A pass of a Runner keeps less: of the layers that the dense head reads their projections
(`dense_head`), and of the last layer the special tokens, which the camera head reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LayoutError
from ..base import Replacement, overridden
from . import dense_head
from .dense_head import Begun, Maps
from .recognition import names_used

HEAD = (
    "_spark3r_head"  # on the aggregator, in passes that need no tokens of the dense head's layers
)

_HEAD_FRAMES = "frames_chunk_size"


@dataclass(frozen=True)
class Version:
    """The version of upstream's code that the savers know. Another one is left alone.

    Attributes:
        methods: Methods of the aggregator that its forward calls.
        forward: Names that its forward uses.
        head: Name of the dense head.
        head_arguments: Names of the arguments of the dense head's forward.
        head_begins: Names that the dense head uses first, in this order.
        camera: Names that a camera head uses which reads only special tokens of the last layer.
    """

    methods: tuple[str, ...]
    forward: frozenset[str]
    head: str
    head_arguments: tuple[str, ...]
    head_begins: tuple[str, ...]
    camera: tuple[str, ...]

    def covers(self, aggregator: nn.Module) -> bool:
        """Return True if an aggregator is of this version, with the methods of its class."""
        replaced = any(overridden(aggregator, name) for name in ("forward", *self.methods))
        return frozenset(names_used(aggregator, "forward")) == self.forward and not replaced

    def projects(self, root: nn.Module) -> bool:
        """Return True if the heads that a Prediction needs can do without whole layers."""
        head, camera = getattr(root, self.head, None), getattr(root, "camera_head", None)
        return dense_head.is_known(head, self.head_arguments, self.head_begins) and (
            camera is None or names_used(camera, "forward") == self.camera
        )


def own_forwards(
    version: Version, root: nn.Module, aggregator: nn.Module, forward: Callable[..., Any]
) -> Iterator[Replacement]:
    """Yield the forwards of an aggregator that is covered, and of its dense head.

    Args:
        version: The version.
        root: Whole model.
        aggregator: Its aggregator.
        forward: What takes the place of the aggregator's forward, with the aggregator first.
    """
    yield aggregator, "forward", partial(forward, aggregator)
    if version.projects(root):
        head = root.get_submodule(version.head)
        yield head, "forward", partial(dense, head)


def handed_projections(
    version: Version, root: nn.Module, aggregator: nn.Module
) -> Iterator[Replacement]:
    """Yield what lets an aggregator that is covered hand projections to the dense head."""
    if version.projects(root):
        yield aggregator, HEAD, root.get_submodule(version.head)


class Dropped(Tensor):
    """Tokens ``[B, S, 0, C]`` in the place of those that were dropped.

    They may be moved, cast, joined and asked for their shape. A mean over no tokens would be NaN,
    so whatever would make numbers of them raises a LayoutError.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        made = result if isinstance(result, (tuple, list)) else (result,)
        if all(_has_no_numbers(each) for each in made):
            return result
        raise LayoutError(
            "these are tokens of a layer that no head of the model reads, and the memory saver has "
            "dropped them: apply the schedule with save_memory=False to read them"
        )


def _has_no_numbers(result: object) -> bool:
    if isinstance(result, Tensor):
        return 0 in result.shape
    return result is None or isinstance(result, _FACTS)


_FACTS = (bool, int, str, torch.dtype, torch.device, torch.layout, torch.UntypedStorage)
"""Types of what a tensor tells without its numbers."""


def dropped(tokens: Tensor) -> Tensor:
    """Return no tokens, ``[B, S, 0, C]``, in the place of ``[B, S, P, C]``."""
    # A view would keep the tokens alive. A fake tensor cannot be of another class.
    empty = tokens.new_empty((*tokens.shape[:2], 0, *tokens.shape[3:]))
    return empty.as_subclass(Dropped) if type(empty) is Tensor else empty


class ProjectedLayers(list[Tensor | None]):
    """What the aggregator returns for the heads, if the dense head is to go on from projections.

    The last entry has the special tokens of the last layer, ``[B, S, special, 2C]``. All others are
    `Dropped`, or None where upstream keeps nothing.

    Attributes:
        maps: Projections of the layers, see `dense_head.project`.
        missing: Tokens of a layer without numbers, ``[B, S, P, 2C]`` on the meta device.
    """

    maps: Maps
    missing: Tensor


class Layers:
    """Collects the outputs of an aggregator's layers in the form that its heads need.

    Args:
        aggregator: The aggregator.
        images: Its input ``[B, S, 3, H, W]``.
        count: Number of its layers.
        start: Special tokens per frame.
    """

    def __init__(self, aggregator: Any, images: Tensor, count: int, start: int) -> None:
        # The dense head takes some frames of all clips together, which projections do not follow.
        self._head = aggregator.__dict__.get(HEAD) if images.shape[0] == 1 else None
        self._size, self._count, self._start = images.shape[-2:], count, start
        self._maps: dict[int, list[Tensor]] = {}
        self._outputs: list[Tensor | None] = []

    def skip(self) -> None:
        """Add a layer of which upstream keeps nothing."""
        self._outputs.append(None)

    def take(self, local: Tensor, tokens: Tensor) -> None:
        """Add a layer.

        Args:
            local: Tokens after its frame block, ``[B, S, P, C]``. It may be `Dropped`.
            tokens: Tokens after its global block, ``[B, S, P, C]``, likewise.
        """
        if self._head is None or 0 in tokens.shape:
            self._outputs.append(torch.cat((local, tokens), dim=-1))
            return
        layer = len(self._outputs)
        for stage, read in enumerate(self._head.intermediate_layer_idx):
            if read % self._count == layer:
                self._maps[stage] = self._project(stage, local, tokens)
        if layer < self._count - 1:
            local, tokens = dropped(local), dropped(tokens)
        kept = (local[:, :, : self._start], tokens[:, :, : self._start])
        self._outputs.append(torch.cat(kept, dim=-1))

    def finished(self, tokens: Tensor) -> list[Tensor | None]:
        """Return the outputs of all layers. ``tokens`` has the shape of one, ``[B, S, P, C]``."""
        if self._head is None:
            return self._outputs
        found = ProjectedLayers(self._outputs)
        found.maps = [self._maps[stage] for stage in sorted(self._maps)]
        shape = (*tokens.shape[:3], 2 * tokens.shape[3])
        found.missing = torch.empty((), dtype=tokens.dtype, device="meta").expand(shape)
        return found

    def _project(self, stage: int, local: Tensor, tokens: Tensor) -> list[Tensor]:
        head, frames = self._head, local.shape[1]

        def patches_of(chosen: slice) -> Tensor:
            return torch.cat([each[0, chosen, self._start :] for each in (local, tokens)], dim=-1)

        at_once = dense_head.frames_at_once(head, _HEAD_FRAMES, frames)
        # Upstream switches off the autocast of CUDA around its heads, whatever the device is.
        return dense_head.project(head, stage, patches_of, frames, at_once, self._size, "cuda")


def embedded(aggregator: Any, images: Tensor) -> Tensor:
    """Return the tokens of all frames, ``[B * S, P, C]``, as upstream's forward begins.

    Normalised images and the encoder's output are freed.
    """
    batch, frames = images.shape[:2]
    expand = type(aggregator).forward.__globals__["slice_expand_and_flatten"]
    normalised = (images - aggregator._resnet_mean) / aggregator._resnet_std
    patches = aggregator.patch_embed(normalised.flatten(0, 1))
    del normalised
    if isinstance(patches, dict):
        patches = patches["x_norm_patchtokens"]
    special = (aggregator.camera_token, aggregator.register_token)
    return torch.cat([*(expand(each, batch, frames) for each in special), patches], dim=1)


def runs_as_upstream(aggregator: nn.Module, images: Tensor) -> bool:
    """Return True if an aggregator runs the forward of its class.

    It does in training, with gradients, in a traced graph, and on images that upstream refuses.
    """
    return (
        aggregator.training
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or images.ndim != 5
        or images.shape[2] != 3
    )


def dense(self: Any, layers: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace a dense head's forward, which goes on from projections if it is given them."""
    forward = type(self).forward
    if not isinstance(layers, ProjectedLayers):
        return forward(self, layers, *args, **kwargs)
    kwargs = dense_head.with_limit(kwargs, self, _HEAD_FRAMES)
    return forward(Begun(self, layers.maps), [layers.missing] * len(layers), *args, **kwargs)
