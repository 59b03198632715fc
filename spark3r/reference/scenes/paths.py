"""Smooth, hand-held-like camera paths that can be sampled at any density."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PERIOD = 8.0  # path time after which the large motion repeats; the jitter does not repeat
KINDS = ("orbit", "walk", "truck", "pan")
SLOW_SHARE = 0.2
JITTER_WAVES = 5


@dataclass(frozen=True)
class CameraPath:
    """A camera path as a function of path time u; a clip usually covers u in [0, 1].

    World axes are OpenCV's (x right, y down, z forward), and lengths are in metres. Progress along
    the path is nearly proportional to u up to 1. Then it slows down, reverses at 2 and comes back,
    so that a path of any length stays inside a bounded region.
    """

    kind: str
    turn: float  # total yaw over u in [0, 1], radians
    travel: Tensor  # [3] displacement over u in [0, 1], metres
    radius: float  # of an orbit, metres
    pitch: float  # radians
    roll: float  # radians
    bend: Tensor  # [3] amplitude of a slow sideways bend, metres
    jitter_amplitude: Tensor  # [6, W]: metres (x, y, z), radians (yaw, pitch, roll)
    jitter_frequency: Tensor  # [6, W] cycles per unit of u
    jitter_phase: Tensor  # [6, W]

    def poses(self, u: Tensor) -> Tensor:
        """Return camera-to-world poses, float64 `[S, 3, 4]`, at path times u, float64 `[S]`."""
        progress = torch.sin(u * (math.pi / 4)) / math.sin(math.pi / 4)
        wave = torch.sin(
            2 * math.pi * self.jitter_frequency * u[:, None, None] + self.jitter_phase
        ) - torch.sin(self.jitter_phase)
        jitter = (self.jitter_amplitude * wave).sum(dim=2)  # [S, 6]
        yaw = self.turn * progress
        position = progress[:, None] * self.travel
        position = position + (1 - torch.cos(progress * math.pi))[:, None] / 2 * self.bend
        if self.kind == "orbit":
            # The camera stands at the origin and looks along +z at a centre `radius` ahead; turning
            # by yaw about that centre keeps it in view.
            around = torch.stack([-torch.sin(yaw), torch.zeros_like(yaw), 1 - torch.cos(yaw)], 1)
            position = position + self.radius * around
        rotation = _rotation(
            yaw + jitter[:, 3], self.pitch + jitter[:, 4], self.roll + jitter[:, 5]
        )
        return torch.cat([rotation, (position + jitter[:, :3])[:, :, None]], dim=2)


def random_path(generator: torch.Generator) -> CameraPath:
    """Return a random path.

    Args:
        generator: CPU generator, which is advanced by a fixed number of draws.
    """
    draw = torch.rand(16, generator=generator, dtype=torch.float64).tolist()
    waves = torch.rand(3, 6, JITTER_WAVES, generator=generator, dtype=torch.float64)
    kind = KINDS[sum(draw[0] >= edge for edge in (0.35, 0.62, 0.88))]
    speed = 0.25 + 0.3 * draw[1] if draw[2] < SLOW_SHARE else 0.6 + 0.7 * draw[1]
    side = 1.0 if draw[3] < 0.5 else -1.0
    low, high = {"orbit": (25, 75), "walk": (15, 60), "truck": (15, 55), "pan": (30, 65)}[kind]
    turn = side * speed * math.radians(low + (high - low) * draw[4])
    heading = {"orbit": 0.0, "walk": 0.0, "truck": math.pi / 2, "pan": 0.0}[kind]
    heading += math.radians(50) * (2 * draw[5] - 1) + (math.pi if draw[6] < 0.3 else 0.0)
    distance = {"orbit": 0.5, "walk": 2.2, "truck": 1.8, "pan": 0.5}[kind]
    distance *= speed * (0.5 + draw[7])
    travel = torch.tensor(
        [math.sin(heading), 0.35 * (2 * draw[8] - 1), math.cos(heading)], dtype=torch.float64
    )
    bend = torch.tensor([2 * draw[9] - 1, draw[10] - 0.5, 2 * draw[11] - 1], dtype=torch.float64)
    frequency = 0.7 + 6.0 * waves[1] ** 2
    shake = speed * (0.3 + 0.7 * draw[12])
    size = torch.tensor([0.05, 0.05, 0.05, 0.03, 0.03, 0.025], dtype=torch.float64)[:, None]
    return CameraPath(
        kind=kind,
        turn=turn,
        travel=distance * travel,
        radius=1.8 + 2.2 * draw[13],
        pitch=math.radians(30) * (2 * draw[14] - 1) * draw[14],
        roll=math.radians(12) * (2 * draw[15] - 1),
        bend=0.25 * speed * bend,
        jitter_amplitude=shake * size * waves[0] / frequency.sqrt(),
        jitter_frequency=frequency,
        jitter_phase=2 * math.pi * waves[2],
    )


def _rotation(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Return camera-to-world rotations `[S, 3, 3]`: roll about z, then pitch, then yaw."""
    pitch, roll = pitch.expand_as(yaw), roll.expand_as(yaw)
    cy, sy, cp, sp = yaw.cos(), yaw.sin(), pitch.cos(), pitch.sin()
    cr, sr = roll.cos(), roll.sin()
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    about_y = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy], 1).reshape(-1, 3, 3)
    about_x = torch.stack([one, zero, zero, zero, cp, -sp, zero, sp, cp], 1).reshape(-1, 3, 3)
    about_z = torch.stack([cr, -sr, zero, sr, cr, zero, zero, zero, one], 1).reshape(-1, 3, 3)
    return about_y @ about_x @ about_z
