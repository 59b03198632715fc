"""π³'s memory savers: heads on a few frames at a time, and nothing kept that was read already.

Upstream's forward keeps the normalised images, the encoder's output and the tokens of both last
layers until it is done, and runs each head on all frames at once, in float32. In a pass of a Runner
another forward calls the same modules. It frees what was read, runs decoder and head on a few
frames at a time, and leaves out the points in world coordinates, which no Prediction reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Replacement, overridden
from . import memory
from .limits import current
from .memory import by_frames, by_tokens, encoder_by_frames, global_block_in_pieces, in_pieces
from .recognition import names_used

# Heads that attend inside frames, in transformers as wide as the decoder.
_HEAD_DECODERS = ("point_decoder", "conf_decoder", "camera_decoder")

_HEADS = ("point_head", "conf_head", "camera_head")
_NORMALISES = ("image_mean", "image_std", "shape", "reshape", "decode")
_PREDICTS = (
    *(*_HEAD_DECODERS, *_HEADS, "patch_start_idx", "exp", "cat", "einsum", "homogenize_points"),
    *("torch", "amp", "autocast", "float"),
)
_PI3_USES = {"forward": {*_NORMALISES, *_PREDICTS, "encoder", "isinstance", "dict", "split"}}
_PI3X_USES = {
    "forward": {*_NORMALISES, "encode", "dec_embed_dim", "forward_head"},
    "forward_head": {
        *(*_PREDICTS, "metric_decoder", "metric_token", "metric_head", "_chunked_conv_head"),
        *("F", "normalize", "ones_like", "device", "reshape", "repeat", "permute", "clamp", "view"),
        "dict",
    },
}
"""What upstream's methods use. Another version is left alone."""


def memory_savers(root: Any) -> Iterator[Replacement]:
    """Yield the replacements on encoder, decoder and heads."""
    yield from encoder_by_frames(root.encoder)
    for i, block in enumerate(root.decoder):
        if i % 2:
            yield from global_block_in_pieces(block, "xpos")
        else:
            yield from by_frames(block, "xpos")
    for name in _HEAD_DECODERS:
        if hasattr(root, name):
            yield from by_frames(getattr(root, name), "xpos")
    for layer in getattr(getattr(root, "camera_head", None), "res_conv", ()):
        yield from by_tokens(layer)


def prediction_savers(root: nn.Module) -> Iterator[Replacement]:
    """Yield the forward that keeps less."""
    for uses, forward in ((_PI3_USES, _pi3_forward), (_PI3X_USES, _pi3x_forward)):
        found = {name: set(names_used(root, name)) for name in uses}
        if found == uses and not any(overridden(root, name) for name in uses):
            yield root, "forward", partial(forward, root)


def _pi3_forward(self: Any, imgs: Tensor) -> dict[str, Tensor]:
    """Return what a Prediction reads of images ``[B, S, 3, H, W]``, as π³ computes it."""
    if _runs_as_it_is():
        output: dict[str, Tensor] = type(self).forward(self, imgs)
        return output
    batch, frames, _, height, width = imgs.shape
    size, start = (height, width), self.patch_start_idx
    encoded = [self.encoder(_normalised(self, imgs).flatten(0, 1), is_training=True)]
    if isinstance(encoded[0], dict):
        encoded = [encoded.pop()["x_norm_patchtokens"]]
    # The list is empty in the call, so that `decode` can free the encoder's output.
    tokens, pos = self.decode(encoded.pop(), frames, height, width)

    def points(some: Tensor, where: Tensor) -> Tensor:
        found = self.point_decoder(some, xpos=where)
        with _float32():
            xy, z = self.point_head([found.float()[:, start:]], size).split([2, 1], dim=-1)
            z = z.exp()
            return torch.cat((xy * z, z), dim=-1)

    def confidence(some: Tensor, where: Tensor) -> Tensor:
        found = self.conf_decoder(some, xpos=where)
        with _float32():
            logits: Tensor = self.conf_head([found.float()[:, start:]], size)
            return logits

    whole = (batch, frames, height, width, -1)
    local_points = _by_frames(points, tokens, pos).reshape(whole)
    conf = _by_frames(confidence, tokens, pos).reshape(whole)
    camera = self.camera_decoder(tokens, xpos=pos)
    del tokens
    grid = (height // self.patch_size, width // self.patch_size)
    with _float32():
        poses = self.camera_head(camera.float()[:, start:], *grid).reshape(batch, frames, 4, 4)
    return {"local_points": local_points, "conf": conf, "camera_poses": poses}


def _pi3x_forward(self: Any, imgs: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Return what a Prediction reads of images ``[B, S, 3, H, W]``, as Pi3X computes it."""
    if _runs_as_it_is() or args or kwargs:
        output: dict[str, Tensor] = type(self).forward(self, imgs, *args, **kwargs)
        return output
    batch, frames, _, height, width = imgs.shape
    grid, start = (height // self.patch_size, width // self.patch_size), self.patch_start_idx
    first, poses, _, posed, _ = self.encode(_normalised(self, imgs))
    encoded = [first.reshape(batch, frames, -1, self.dec_embed_dim)]
    del first
    tokens, pos = self.decode(encoded.pop(), frames, height, width, poses, posed)
    whole = (batch, frames, height, width, -1)
    local_points = _maps(self, "point", tokens, pos, grid).reshape(whole)
    camera = self.camera_decoder(tokens, xpos=pos)
    everywhere = pos.reshape(batch, -1, pos.shape[-1])
    metric = self.metric_decoder(
        self.metric_token.repeat(batch, 1, 1),
        tokens.reshape(batch, -1, tokens.shape[-1]),
        xpos=everywhere[:, :1],
        ypos=everywhere,
    )
    conf = _maps(self, "conf", tokens, pos, grid).reshape(whole)
    del tokens
    with _float32():
        xy, z = local_points.split([2, 1], dim=-1)
        z = torch.exp(z.clamp(max=15.0))
        local_points = torch.cat((xy * z, z), dim=-1)
        poses = self.camera_head(camera[:, start:].float(), *grid).reshape(batch, frames, 4, 4)
        metric = self.metric_head(metric.float()).reshape(batch).exp()
        poses[..., :3, 3] = poses[..., :3, 3] * metric.view(batch, 1, 1)
        local_points = local_points * metric.view(batch, 1, 1, 1, 1)
    return {"local_points": local_points, "conf": conf, "camera_poses": poses}


def _by_frames(function: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, pos: Tensor) -> Tensor:
    """Return a function's output for all frames of its arguments, a few at a time."""
    return in_pieces(
        lambda some: function(tokens[some], pos[some]), len(tokens), memory.most_frames()
    )


def _maps(self: Any, name: str, tokens: Tensor, pos: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the maps ``[B * S, H, W, channels]`` of one of Pi3X's decoders and its convolutions.

    These run on as many frames at a time as upstream's do, so that they round the same.
    """
    decoder, head = getattr(self, f"{name}_decoder"), getattr(self, f"{name}_head")
    most = inspect.signature(self._chunked_conv_head).parameters["chunk_size"].default
    most = min(most, current().head_frames or most)
    whole: Tensor | None = None
    for first in range(0, len(tokens), most):
        some = slice(first, first + most)
        found = decoder(tokens[some], xpos=pos[some])
        with _float32():
            found = found[:, self.patch_start_idx :].float()
            maps = head(found, patch_h=grid[0], patch_w=grid[1])
            part = torch.cat([each.permute(0, 2, 3, 1) for each in maps], dim=-1)
        if whole is None:
            whole = part.new_empty((len(tokens), *part.shape[1:]))
        whole[some] = part
    assert whole is not None
    return whole


def _runs_as_it_is() -> bool:
    """Return True in a pass that records gradients or is traced."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def _normalised(self: Any, imgs: Tensor) -> Tensor:
    return (imgs - self.image_mean) / self.image_std


def _float32() -> torch.autocast:
    """Return the context that upstream runs its heads in, which ends autocast on CUDA alone."""
    return torch.autocast("cuda", enabled=False)
