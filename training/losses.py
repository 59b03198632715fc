"""Training losses: depth, cameras, the point map, and three auxiliary tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spark3r.geometry import quaternion_to_matrix
from spark3r.reference.blocks import Block
from spark3r.reference.model import PATCH_SIZE, WIDTH
from spark3r.rope import Rope, apply_rope

from .batches import Batch

MATCH_BLOCK, FLOW_BLOCK = 1, 3  # global blocks whose outputs the auxiliary heads read
ATTENTION_BLOCKS = (2, 3)  # global blocks whose first head is trained to attend to the match
WEIGHTS = {
    "depth": 1.0,
    "abs_rel": 0.5,
    "gradient": 0.5,
    "confidence": 0.02,
    "rotation": 1.0,
    "translation": 1.0,
    "relative": 0.3,
    "fov": 0.3,
    "points": 0.5,
    "flow": 0.25,
    "match": 0.05,
    "attention": 0.1,
}
OCCLUSION = 0.08  # relative depth difference above which a point counts as hidden


class AuxiliaryHeads(nn.Module):
    """Heads of the auxiliary tasks, which pull global attention off its initial plateau."""

    def __init__(self) -> None:
        super().__init__()
        self.match = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(10.0)))
        self.flow = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2))
        self.points = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12))


@dataclass(frozen=True)
class Activations:
    """Activations inside the model that the auxiliary tasks read."""

    match: Tensor  # [B, S, h*w, C] patch tokens after MATCH_BLOCK
    flow: Tensor  # [B, S, h*w, C] after FLOW_BLOCK
    final: Tensor  # [B, S, h*w, C] at the end
    attended: tuple[tuple[Block, Tensor, Rope], ...]  # ATTENTION_BLOCKS and their inputs


def training_losses(
    predictions: dict[str, Tensor],
    activations: Activations,
    heads: AuxiliaryHeads,
    batch: Batch,
    shift: int,
) -> dict[str, Tensor]:
    """Return every loss of a forward pass.

    Args:
        predictions: The model's outputs.
        activations: Activations of the same pass.
        heads: The auxiliary heads.
        batch: The targets.
        shift: Offset of the frame that each frame is matched with, cyclically, in [0, S).

    Returns:
        Unweighted scalars, by the names of `WEIGHTS`.
    """
    losses = _depth_losses(predictions, batch) | _pose_losses(predictions["pose_enc"], batch)
    frames, height, width = batch.depth.shape[1:]
    grid = (height // PATCH_SIZE, width // PATCH_SIZE)
    _, world = world_points(batch, PATCH_SIZE // 2, PATCH_SIZE)
    fine_depth, fine_world = world_points(batch, PATCH_SIZE // 4, PATCH_SIZE // 2)
    points = heads.points(activations.final.float())  # [B, S, h*w, 12], 2x2 points per patch
    points = points.unflatten(2, grid).unflatten(4, (2, 2, 3)).permute(0, 1, 2, 4, 3, 5, 6)
    error = (points.reshape(fine_world.shape) - fine_world).abs().sum(dim=-1)
    losses["points"] = (error / (0.5 + fine_depth)).clamp(max=3.0).mean()
    if frames == 1:
        return losses
    target, _, inside = _project(world, batch, torch.zeros(frames, dtype=torch.long))
    flow = (heads.flow(activations.flow.float()) - target).abs().sum(dim=-1)
    near = inside & (target.abs() < 2.0).all(dim=-1)
    losses["flow"] = _masked_mean(flow[:, 1:], near[:, 1:])
    partner = (torch.arange(frames, device=world.device) + shift) % frames
    label, visible = _correspondence(world, batch, partner, grid)
    feature = F.normalize(heads.match(activations.match.float()), dim=-1)
    logits = feature @ feature[:, partner].transpose(2, 3) * heads.log_temperature.exp()
    losses["match"] = _label_loss(logits, label, visible)
    attention = [
        _label_loss(_attention_logits(block, x, rope, partner, grid), label, visible)
        for block, x, rope in activations.attended
    ]
    losses["attention"] = torch.stack(attention).mean()
    return losses


def weighted_sum(losses: dict[str, Tensor]) -> Tensor:
    """Return the sum of the losses, weighted by `WEIGHTS`."""
    return torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum()


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _depth_losses(predictions: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Return L1 of log depth and of its gradients, AbsRel, and the confidence's likelihood."""
    difference = predictions["depth"][..., 0].log() - batch.depth.log()
    error = difference.abs()
    # Clamped, because depth jumps at the edges of near objects.
    relative = torch.expm1(difference.clamp(max=1.0)).abs()
    gradient = difference.new_zeros(())
    for step in (1, 2, 4):
        gradient = gradient + (difference[..., step:] - difference[..., :-step]).abs().mean()
        gradient = gradient + (difference[..., step:, :] - difference[..., :-step, :]).abs().mean()
    confidence = predictions["depth_conf"]
    likelihood = confidence * error.detach() * 5.0 - confidence.log()
    return {
        "depth": error.mean(),
        "abs_rel": relative.mean(),
        "gradient": gradient / 6.0,
        "confidence": likelihood.mean(),
    }


def _pose_losses(encoding: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Return the losses of rotation, of translation (to frame 0, of pairs) and of field of view."""
    rotation = quaternion_to_matrix(encoding[..., 3:7])
    target_rotation, target = batch.extrinsics[..., :3], batch.extrinsics[..., 3]
    translation = encoding[..., :3]
    fov = (encoding[..., 7:].log() - batch.fov.log()[:, None]).abs().mean()
    frames = encoding.shape[1]
    if frames == 1:
        return {"fov": fov}
    first, second = torch.triu_indices(frames, frames, 1, device=encoding.device).unbind(0)
    offset = target_rotation.transpose(2, 3) @ rotation  # [B, S, 3, 3]
    gap = (offset[:, first] - offset[:, second]).square().sum(dim=(2, 3))
    angle = (gap / 2 + 1e-6).sqrt()  # for small angles about the angle in radians
    moves = _relative(rotation, translation, first, second)
    target_moves = _relative(target_rotation, target, first, second)
    length = target_moves.norm(dim=-1)
    relative = ((moves - target_moves).square().sum(dim=-1) + 1e-8).sqrt() / (length + 0.05)
    direct = ((translation - target)[:, 1:].square().sum(dim=-1) + 1e-8).sqrt()
    return {
        "rotation": angle.mean(),
        "translation": direct.mean(),
        "relative": relative.clamp(max=3.0).mean(),
        "fov": fov,
    }


def _relative(rotation: Tensor, translation: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the position of camera `second` in the axes of camera `first`, `[B, P, 3]`."""
    centre = -(rotation.transpose(2, 3) @ translation[..., None])
    return (rotation[:, first] @ (centre[:, second] - centre[:, first]))[..., 0]


def world_points(batch: Batch, start: int, step: int) -> tuple[Tensor, Tensor]:
    """Return depth and world points of a regular grid of pixels.

    Args:
        batch: The clips.
        start: First row and column of the grid.
        step: Distance between rows and between columns, in pixels.

    Returns:
        Depth `[B, S, n]` and points in the axes of frame 0 `[B, S, n, 3]`, row-major.
    """
    height, width = batch.depth.shape[2:]
    depth = batch.depth[:, :, start::step, start::step].flatten(2)
    y = torch.arange(start, height, step, device=depth.device) + 0.5 - height / 2
    x = torch.arange(start, width, step, device=depth.device) + 0.5 - width / 2
    yx = torch.cartesian_prod(y, x)
    half = torch.tensor([height / 2, width / 2], device=depth.device)
    inverse_focal = torch.tan(batch.fov / 2) / half  # [B, 2]
    ray = (yx * inverse_focal[:, None]).flip(-1)  # [B, n, 2]
    ray = torch.cat([ray, torch.ones_like(ray[..., :1])], dim=2)
    points = depth[..., None] * ray[:, None] - batch.extrinsics[:, :, None, :, 3]
    return depth, points @ batch.extrinsics[..., :3]


def _project(world: Tensor, batch: Batch, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project the points of each frame i into frame ``target[i]``.

    Returns:
        Image coordinates in [-1, 1] `[B, S, n, 2]`, depth there `[B, S, n]`, and whether the point
        lies in front of that camera.
    """
    pose = batch.extrinsics[:, target]
    points = world @ pose[..., :3].transpose(2, 3) + pose[:, :, None, :, 3]
    depth = points[..., 2]
    plane = points[..., :2] / depth.clamp(min=0.05)[..., None]
    half = torch.tan(batch.fov / 2).flip(-1)  # horizontal, vertical
    return plane / half[:, None, None], depth, depth > 0.05


def _correspondence(
    world: Tensor, batch: Batch, partner: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the patch of the partner frame that each patch's centre is in, and its visibility."""
    height, width = batch.depth.shape[2:]
    place, depth, front = _project(world, batch, partner)
    inside = front & (place.abs() < 1.0).all(dim=-1)
    size = torch.tensor([width, height], device=world.device)
    pixel = ((place + 1) / 2 * size).long().clamp(min=0)
    pixel = torch.minimum(pixel, size - 1)
    seen = batch.depth[:, partner].flatten(2)
    seen = seen.gather(2, pixel[..., 1] * width + pixel[..., 0])
    label = (pixel[..., 1] // PATCH_SIZE) * grid[1] + pixel[..., 0] // PATCH_SIZE
    return label, inside & ((seen - depth).abs() < OCCLUSION * depth)


def _attention_logits(
    block: Block, x: Tensor, rope: Rope, partner: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Return logits of a block's first head, from patches to the partner frame's patches.

    Patches of other frames are left out, because they may show the same point.

    Args:
        block: A global block.
        x: Its input, `[B, S*P, C]`.
        rope: Its rotation tables.
        partner: Partner of each frame, `[S]`.
        grid: Rows and columns of the patch grid.

    Returns:
        The logits, `[B, S, h*w, h*w]`.
    """
    attention, size, frames = block.attn, block.attn.head_dim, len(partner)
    width = x.shape[2]
    weight, bias = attention.qkv.weight, attention.qkv.bias
    y = block.norm1(x.float())
    q = attention.q_norm(F.linear(y, weight[:size], bias[:size]))
    k = attention.k_norm(F.linear(y, weight[width : width + size], bias[width : width + size]))
    q, k = (apply_rope(t[:, None], rope)[:, 0].unflatten(1, (frames, -1)) for t in (q, k))
    special = q.shape[2] - grid[0] * grid[1]
    q, k = q[:, :, special:], k[:, :, special:]
    return q @ k[:, partner].transpose(2, 3) * size**-0.5


def _label_loss(logits: Tensor, label: Tensor, visible: Tensor) -> Tensor:
    """Return the mean cross entropy of logits `[B, S, n, m]` over the visible patches."""
    loss = F.cross_entropy(logits.flatten(0, 2), label.flatten(), reduction="none")
    return _masked_mean(loss.view_as(label), visible)
