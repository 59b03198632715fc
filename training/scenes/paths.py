"""Camera paths of people who hold a camera, walk and look around."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .places import Place
from .shapes import Triple

PERIOD = 4.0  # path time after which the slow movement, not the shake, repeats
SLOW_WAVES, SHAKE_WAVES = 4, 4
SHORTEST_S, LONGEST_S = 6.4, 32.0  # 48 frames of 30 a second: every 4th, every 20th
TURN_SHARPNESS = 0.03  # how abruptly a path turns round
PATHS = 80  # tried at most
CHOICE = 3  # good paths that one is chosen from
LEAST_SHAPES = 6.5  # seen on average
GAP_M = 0.25  # between the camera and everything else


@dataclass(frozen=True)
class CameraPath:
    """A camera path as a function of path time u; a clip usually covers u in [0, 1].

    Position and angles are sums of waves. At u = 2 the slow ones turn round and go back, so that a
    path of any length stays where it was found to be free. World axes follow OpenCV: x right, y
    down, z forward; lengths in metres, angles in radians.
    """

    anchor: Tensor  # [3] position around which the camera moves
    target: Tensor  # [3] what the camera looks at, more or less
    attention: float  # share of the turn that keeps the target in view, 0 to 1
    view: Tensor  # [3] yaw, pitch and roll beside those that look at the target
    amplitude: Tensor  # [6, W]: x, y, z, yaw, pitch, roll; slow waves come first
    frequency: Tensor  # [6, W] cycles per unit of u
    phase: Tensor  # [6, W]

    def poses(self, u: Tensor) -> Tensor:
        """Sample camera-to-world poses.

        Args:
            u: Path times, float64 `[S]`.

        Returns:
            float64 `[S, 3, 4]`, camera-to-world.
        """
        offset = self._offsets(u)
        position = self.anchor + offset[:, :3]
        now, then = self._towards(position), self._towards(self.anchor[None])
        turn = torch.remainder(now[:, 0] - then[:, 0] + math.pi, 2 * math.pi) - math.pi
        yaw = then[:, 0] + self.attention * turn + self.view[0] + offset[:, 3]
        pitch = torch.lerp(then[:, 1], now[:, 1], self.attention) + self.view[1] + offset[:, 4]
        rotation = rotations(yaw, pitch.clamp(-1.2, 1.2), self.view[2] + offset[:, 5])
        return torch.cat([rotation, position[:, :, None]], dim=2)

    def _offsets(self, u: Tensor) -> Tensor:
        """Sums of waves `[S, 6]`."""
        folded = torch.acos((1 - TURN_SHARPNESS) * torch.cos(u * (math.pi / 2))) * (2 / math.pi)
        time = torch.cat(
            [folded[:, None].expand(-1, SLOW_WAVES), u[:, None].expand(-1, SHAKE_WAVES)], 1
        )
        angle = 2 * math.pi * self.frequency * time[:, None] + self.phase
        return (self.amplitude * torch.sin(angle)).sum(dim=2)

    def _towards(self, position: Tensor) -> Tensor:
        """Yaw and pitch `[S, 2]` that look from positions `[S, 3]` at the target."""
        ray = self.target - position
        level = (ray[:, 0].square() + ray[:, 2].square()).sqrt()
        return torch.stack([torch.atan2(ray[:, 0], ray[:, 2]), torch.atan2(-ray[:, 1], level)], 1)


def rotations(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Compose camera-to-world rotations `[S, 3, 3]`: roll about z, then pitch, then yaw.

    A positive pitch looks up.
    """
    cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (torch.cos, torch.sin))
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    about_y = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy], 1).reshape(-1, 3, 3)
    about_x = torch.stack([one, zero, zero, zero, cp, -sp, zero, sp, cp], 1).reshape(-1, 3, 3)
    about_z = torch.stack([cr, -sr, zero, sr, cr, zero, zero, zero, one], 1).reshape(-1, 3, 3)
    return about_y @ about_x @ about_z


def random_path(rng: random.Random, anchor: Triple, target: Triple) -> CameraPath:
    """Draw a path around a place.

    Args:
        rng: Source of every choice.
        anchor: x, height and z around which the camera moves.
        target: x, height and z of what it looks at.

    Returns:
        The path. It may lead through things.
    """
    seconds = SHORTEST_S * (LONGEST_S / SHORTEST_S) ** rng.random()
    longer = (seconds / SHORTEST_S) ** 0.5
    reach = 0.4 * 5.0 ** rng.random() * longer  # metres between the farthest positions of a clip
    turn = math.radians(15.0 * 6.0 ** rng.random()) * longer
    kind = rng.random()
    if kind < 0.2:  # stands and looks around
        reach, turn, attention = 0.3 * reach, 1.5 * turn, 0.1
    elif kind < 0.6:  # walks around what it looks at
        reach, turn, attention = 1.3 * reach, 0.4 * turn, rng.uniform(0.7, 1.0)
    else:
        attention = rng.uniform(0.0, 0.7)
    heading, across = rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 0.6)
    reaches = [
        reach * math.hypot(math.cos(heading), across * math.sin(heading)),
        reach * rng.uniform(0.05, 0.3),
        reach * math.hypot(math.sin(heading), across * math.cos(heading)),
        turn,
        turn * rng.uniform(0.15, 0.5),
        turn * rng.uniform(0.05, 0.25),
    ]
    shake = rng.uniform(0.2, 1.0) * seconds
    jitters = (0.005, 0.005, 0.005, 0.012, 0.012, 0.01)  # metres and radians, times a second
    waves = [_waves(rng, r, shake * j, seconds) for r, j in zip(reaches, jitters, strict=True)]
    roll = rng.gauss(0, 4.0) if rng.random() < 0.8 else rng.gauss(0, 12.0)
    view = [rng.gauss(0, 0.15), rng.gauss(-0.05, 0.12), math.radians(roll)]
    table = torch.tensor(waves, dtype=torch.float64)  # [6, 3, W]
    return CameraPath(
        anchor=torch.tensor([anchor[0], -anchor[1], anchor[2]], dtype=torch.float64),
        target=torch.tensor([target[0], -target[1], target[2]], dtype=torch.float64),
        attention=attention,
        view=torch.tensor(view, dtype=torch.float64),
        amplitude=table[:, 0],
        frequency=table[:, 1],
        phase=table[:, 2],
    )


def _waves(rng: random.Random, reach: float, shake: float, seconds: float) -> list[list[float]]:
    """Draw amplitudes, frequencies and phases of one coordinate.

    Args:
        rng: Source of every choice.
        reach: Range of the slow waves' sum over a clip.
        shake: Amplitude of the fast waves at one cycle per unit of path time.
        seconds: Length of a unit of path time.
    """
    slow = [rng.uniform(0.15, 0.6)] + [rng.uniform(0.4, 3.0) for _ in range(SLOW_WAVES - 1)]
    fast = [rng.uniform(0.6, 4.0) * seconds for _ in range(SHAKE_WAVES)]
    amplitude = [rng.uniform(0.3, 1.0) / f for f in slow]
    phase = [rng.uniform(0, 2 * math.pi) for _ in range(SLOW_WAVES + SHAKE_WAVES)]
    sums = [
        sum(a * math.sin(2 * math.pi * f * k / 8 + p)
            for a, f, p in zip(amplitude, slow, phase, strict=False))
        for k in range(9)
    ]  # fmt: skip
    scale = reach / (max(sums) - min(sums))
    amplitude = [a * scale for a in amplitude] + [shake * rng.uniform(0.2, 1.0) / f for f in fast]
    return [amplitude, slow + fast, phase]


def choose_path(
    place: Place, rng: random.Random, shapes_seen: Callable[[Tensor], float]
) -> CameraPath:
    """Draw paths, and return of the first that are clear the one that sees and moves the most.

    Args:
        place: What the path leads through.
        rng: Source of every choice.
        shapes_seen: Returns how many shapes views show on average, 0 if one is right before the
            lens, given camera-to-world poses, float64 `[s, 3, 4]`.

    Returns:
        The path. Its camera keeps still if the place is too crowded to move.
    """
    u = torch.linspace(0, PERIOD / 2, 49, dtype=torch.float64)
    good: list[tuple[float, CameraPath]] = []
    for _ in range(PATHS):
        anchor = _standpoint(place, rng)
        path = random_path(rng, anchor, _sight(place, rng, anchor))
        poses = path.poses(u)
        points = poses[:, :, 3]
        if not all(place.clear(x, -y, z, GAP_M) for x, y, z in points.tolist()):
            continue
        seen = shapes_seen(poses[::8])
        if seen > LEAST_SHAPES:
            reach = float((points[:25] - points[0]).norm(dim=1).amax())
            good.append((seen * math.sqrt(reach), path))
            if len(good) == CHOICE:
                break
    if good:
        return max(good, key=lambda pair: pair[0])[1]
    return _calmed(path, 0.0)


def _standpoint(place: Place, rng: random.Random) -> Triple:
    """Draw where a camera may be: at the height of a hand or an eye."""
    for _ in range(50):
        point = (
            rng.uniform(0.4, place.width - 0.4),
            rng.uniform(1.05, 1.8),
            rng.uniform(0.4, place.depth - 0.4),
        )
        if place.clear(*point, GAP_M + 0.05):
            break
    return point


def _sight(place: Place, rng: random.Random, anchor: Triple) -> Triple:
    """Choose what to look at, from one to four metres away if possible."""
    near = [s for s in place.sights if 0.9 < math.dist(anchor, s) < 4.5]
    if not near or rng.random() < 0.15:
        x, z = rng.uniform(0, place.width), rng.uniform(0, place.depth)
        return x, rng.uniform(0.2, 1.6), z
    return rng.choice(near)


def _calmed(path: CameraPath, factor: float) -> CameraPath:
    """Return the path with smaller movements; turns stay."""
    amplitude = path.amplitude.clone()
    amplitude[:3] *= factor
    return replace(path, amplitude=amplitude)
