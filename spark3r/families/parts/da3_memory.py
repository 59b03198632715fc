"""Depth-Anything-3's memory savers: one copy of the tokens that the heads read, or none.

Upstream's backbone keeps the local and global tokens of four layers side by side, ``[B, S, P,
2C]``, and then normalises the global half into a second copy of all four. Its loop over the blocks
calls ``locals()``, which before Python 3.13 keeps the tokens of the last of these layers alive once
more. Here the loop frees what it no longer needs, and each layer is normalised as soon as it is
there.

A pass of a Runner keeps projections of the layers alone (`dense_head`), and the caller's images in
the place of normalised ones (`NormalisedOnDemand`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...errors import FamilyError
from ...reduction.exchange import Exchange
from ..base import Replacement, overridden
from . import memory
from .dense_head import Begun, Maps, frames_at_once, is_known, project, with_limit
from .memory import by_frames, global_block_in_pieces
from .preprocessing import imagenet_normalised
from .recognition import arguments, attentions, has, names_used
from .reference_view import Slots

_LAYERS = "get_intermediate_layers"
_COLLECT = "_get_intermediate_layers_not_chunked"
_ARGUMENTS = ("x", "n", "export_feat_layers", "kwargs")
_COLLECT_USES = frozenset(
    {
        *("prepare_tokens_with_masks", "_prepare_rope", "process_attention", "blocks", "shape"),
        *("rope", "rope_start", "alt_start", "camera_token", "cat_token", "device", "expand"),
        *("select_reference_view", "reorder_by_reference", "restore_original_order", "get"),
        *("THRESH_FOR_REF_SELECTION", "locals", "torch", "cat", "append", "enumerate", "range"),
        *("len", "isinstance", "int", "logger", "info"),
    }
)
"""What upstream's loop over the blocks uses. Another version is left alone."""

_DENSE_ARGUMENTS = ("feats", "H", "W", "patch_start_idx", "chunk_size")
_DENSE_BEGINS = (
    *("shape", "patch_size", "enumerate", "intermediate_layer_idx"),
    *("norm", "permute", "reshape", "projects"),
)
"""What the dense head uses first, in this order."""

_HEAD = "_spark3r_head"  # on the transformer, in passes that need no tokens of its layers

_HEAD_FRAMES = "chunk_size"

_EXCHANGE = "_spark3r_exchange"  # on the transformer, while several ranks share its clips

_Order = Tensor | Slots | None
"""Slot of each of the caller's frames, ``[B * S]``, or how ranks bring them back; None if slots are
the caller's frames."""

_Layer = tuple[Tensor, Tensor]
_Layers = tuple[tuple[_Layer, ...], list[Tensor]]


class NormalisedOnDemand(Tensor):
    """Images in [0, 1] that are normalised whenever something computes with them.

    The backbone does so once, at its beginning, and its callers hold the images until the pass is
    over.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _FACTS:
            return super().__torch_function__(func, types, args, kwargs or {})
        args, kwargs = tree_map_only(cls, _normalised, (args, kwargs or {}))
        return func(*args, **kwargs)


_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")),
    *(Tensor.size, Tensor.dim, Tensor.is_floating_point),
}
"""What a tensor tells without its numbers."""


def on_demand(images: Tensor) -> Tensor:
    """Return images that are normalised whenever something computes with them."""
    if type(images) is not Tensor:  # a tensor of one kind cannot be one of another, too
        return imagenet_normalised(images)
    return images.as_subclass(NormalisedOnDemand)


def _normalised(images: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        plain = images.as_subclass(Tensor)
    return imagenet_normalised(plain)


def memory_savers(
    transformer: Any, attention: Iterable[nn.Module], head: Any
) -> Iterator[Replacement]:
    """Yield the replacements on a backbone's transformer, on its blocks and on its dense head.

    Args:
        transformer: Module ``pretrained`` of the backbone.
        attention: Global attention modules.
        head: Dense head of the network, or None.
    """
    whole = set(attention)
    for block, attn in zip(transformer.blocks, attentions(transformer.blocks), strict=True):
        if attn in whole:
            yield from global_block_in_pieces(block, "pos", "attn_mask")
        else:
            yield from by_frames(block, "pos")
    if _is_known_transformer(transformer):
        yield transformer, _LAYERS, partial(_layers, transformer)
        if _is_known_head(head):
            yield head, "forward", partial(_dense, head)


def prediction_savers(transformer: nn.Module, head: Any) -> Iterator[Replacement]:
    """Yield what lets the backbone hand projections to the dense head, see `memory_savers`."""
    if _is_known_transformer(transformer) and _is_known_head(head):
        yield transformer, _HEAD, head


def shared_views(transformer: nn.Module, exchange: Exchange) -> Iterator[Replacement]:
    """Yield what lets ranks choose the reference view together, and exchange frames.

    Raises:
        FamilyError: If upstream's code is of another version.
    """
    if not _is_known_transformer(transformer):
        raise FamilyError(
            f"the backbone ({type(transformer).__name__}) is of an unknown version, which may "
            "choose its reference view in another way, so several processes cannot share a clip"
        )
    yield transformer, _EXCHANGE, exchange
    yield transformer, _LAYERS, partial(_layers, transformer)


def _is_known_transformer(transformer: nn.Module) -> bool:
    kind = type(transformer)
    return (
        getattr(transformer, "cat_token", False)
        and has(kind, _COLLECT, _LAYERS)
        and arguments(transformer, _LAYERS) == _ARGUMENTS
        and frozenset(names_used(transformer, _COLLECT)) == _COLLECT_USES
        and not overridden(transformer, _COLLECT)
        and not overridden(transformer, _LAYERS)
    )


def _is_known_head(head: Any) -> bool:
    return is_known(head, _DENSE_ARGUMENTS, _DENSE_BEGINS) and tuple(
        head.intermediate_layer_idx
    ) == tuple(range(len(head.projects)))


class ProjectedLayers(tuple[_Layer, ...]):
    """What the backbone returns for the dense head: layers that it has begun already.

    Each entry holds tokens without numbers, ``[B, S, h * w, 2C]`` on the meta device, and the
    camera token of every frame, ``[B, S, 2C]``.

    Attributes:
        maps: Projections of the layers, see `dense_head.project`.
    """

    maps: Maps


def _layers(
    self: Any, x: Tensor, n: Any = 1, export_feat_layers: Any = (), **kwargs: Any
) -> _Layers:
    """Return patch tokens ``[B, S, h * w, 2C]`` and camera token ``[B, S, 2C]`` of each layer.

    It replaces the method of upstream's transformer.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        output: _Layers = type(self).get_intermediate_layers(
            self, x, n, export_feat_layers, **kwargs
        )
        return output
    head = self.__dict__.get(_HEAD)
    start = 1 + self.num_register_tokens
    layers: list[_Layer] = []
    maps: Maps = []
    exported: list[Tensor] = []
    taken = range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
    if head is not None and len(taken) != len(head.projects):
        head = None

    def take(i: int, local: Tensor, tokens: Tensor, order: _Order) -> None:
        if i in export_feat_layers:
            exported.append(tokens)  # the next block may still write the camera token to them
        if i not in taken:
            return
        if isinstance(order, Slots):
            local, tokens, order = order.restore(local), order.restore(tokens), None
        camera = torch.cat((local[:, :, 0], tokens[:, :, 0]), dim=-1)
        camera = _chosen(camera.flatten(0, 1), order, slice(None)).view_as(camera)
        if head is None:
            layers.append((_joined(self, local, tokens, order)[..., start:, :], camera))
            return
        maps.append(_projected(self, head, len(maps), local, tokens, order, x.shape[-2:]))
        missing = torch.empty((), device="meta", dtype=tokens.dtype)
        patches = tokens.shape[2] - start
        layers.append((missing.expand(*x.shape[:2], patches, camera.shape[-1]), camera))

    _run_blocks(self, x, take, **kwargs)
    features = [self.norm(each)[..., start:, :] for each in exported]
    if head is None:
        return tuple(layers), features
    projected = ProjectedLayers(layers)
    projected.maps = maps
    return projected, features


def _run_blocks(
    self: Any,
    x: Tensor,
    take: Callable[[int, Tensor, Tensor, _Order], None],
    cam_token: Tensor | None = None,
    **kwargs: Any,
) -> None:
    """Run a transformer's blocks as upstream's loop does.

    Args:
        self: The transformer.
        x: Images ``[B, S, 3, H, W]``.
        take: Called after each block with its index, the tokens after the last block inside frames
            and those after this block, each ``[B, S, P, C]`` in the order of the slots, and their
            order.
        cam_token: Camera tokens ``[B, S, C]`` of given cameras.
        kwargs: ``ref_view_strategy`` and ``attn_mask``, as upstream takes them.
    """
    upstream = getattr(type(self), _COLLECT).__globals__
    batch, frames, _, height, width = x.shape
    rotated, alternates = self.rope is not None, self.alt_start != -1
    exchange: Exchange | None = self.__dict__.get(_EXCHANGE)
    shard = None if exchange is None else exchange.shard
    views = frames if shard is None else shard.whole.frames
    order: _Order = None
    local: Tensor | None = None
    tokens: Tensor = self.prepare_tokens_with_masks(x)
    pos, same = self._prepare_rope(batch, frames, height, width, x.device)
    for i, block in enumerate(self.blocks):
        choose = cam_token is None and views >= upstream["THRESH_FOR_REF_SELECTION"]
        choose = choose and alternates and i == self.alt_start - 1
        strategy = kwargs.get("ref_view_strategy", "saddle_balanced")
        if choose and exchange is not None and shard is not None:
            classes = exchange.gather(tokens[:, :, :1])
            order = Slots(shard, upstream["select_reference_view"](classes, strategy=strategy))
            tokens = order.reorder(tokens)
        elif choose:
            reference = upstream["select_reference_view"](tokens, strategy=strategy)
            tokens = upstream["reorder_by_reference"](tokens, reference)
            slots = torch.arange(batch * frames, device=x.device).view(batch, frames)
            order = upstream["restore_original_order"](slots, reference).flatten()
        if alternates and i == self.alt_start:
            if cam_token is None:
                first, others = self.camera_token[:, :1], self.camera_token[:, 1:]
                cam_token = torch.cat(
                    (first.expand(batch, -1, -1), others.expand(batch, frames - 1, -1)), dim=1
                )
            tokens[:, :, 0] = cam_token
        turned = rotated and i >= self.rope_start
        if alternates and i >= self.alt_start and i % 2 == 1:
            mask = kwargs.get("attn_mask")
            where = same if turned else None
            tokens = self.process_attention(tokens, block, "global", pos=where, attn_mask=mask)
        else:
            local = None  # it is freed before the block runs
            tokens = self.process_attention(tokens, block, "local", pos=pos if turned else None)
            local = tokens
        take(i, tokens if local is None else local, tokens, order)


def _chosen(frames: Tensor, order: Tensor | None, chosen: slice) -> Tensor:
    """Return some of the caller's frames among slots ``[B * S, ...]``."""
    return frames[chosen] if order is None else frames.index_select(0, order[chosen])


def _halves(
    self: Any, local: Tensor, tokens: Tensor, order: Tensor | None, chosen: slice
) -> Tensor:
    """Return local and normalised global tokens of some frames side by side."""
    parts = (_chosen(each.flatten(0, 1), order, chosen) for each in (local, tokens))
    return torch.cat((next(parts), self.norm(next(parts))), dim=-1)


def _joined(self: Any, local: Tensor, tokens: Tensor, order: Tensor | None) -> Tensor:
    """Return local and normalised global tokens side by side, ``[B, S, P, 2C]``."""
    count = local.shape[0] * local.shape[1]
    joined = memory.in_pieces(
        lambda chosen: _halves(self, local, tokens, order, chosen), count, memory.most_frames()
    )
    return joined.view(*local.shape[:2], *joined.shape[1:])


def _projected(
    self: Any,
    head: Any,
    stage: int,
    local: Tensor,
    tokens: Tensor,
    order: Tensor | None,
    size: Sequence[int],
) -> list[Tensor]:
    """Return a layer's projections as the dense head begins with them, piece by piece."""
    frames = local.shape[0] * local.shape[1]
    at_once = frames_at_once(head, _HEAD_FRAMES, local.shape[1])
    if at_once == local.shape[1]:
        at_once = frames  # then the head takes all clips together

    def patches_of(chosen: slice) -> Tensor:
        return _halves(self, local, tokens, order, chosen)[:, 1 + self.num_register_tokens :]

    device = "cpu" if local.device.type == "meta" else local.device.type
    return project(head, stage, patches_of, frames, at_once, size, device)


def _dense(self: Any, feats: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace the dense head's forward, which goes on from projections if it is given them."""
    if not isinstance(feats, ProjectedLayers):
        return type(self).forward(self, feats, *args, **kwargs)
    kwargs = with_limit(kwargs, self, _HEAD_FRAMES)
    return type(self).forward(Begun(self, feats.maps), feats, *args, **kwargs)
