import math

import pytest
import torch
from torch import Tensor

from training.scenes.geometry import GROUP_SHAPES, Geometry, make_geometry
from training.scenes.shapes import BALL, BOX, TUBE, Shape
from training.scenes.tracing import SHELL, SKIRTING, Enclosure, leave_room, nearest, trace


def shapes(kind: int, count: int) -> list[Shape]:
    numbers = torch.rand(
        count, 9, generator=torch.Generator().manual_seed(kind), dtype=torch.double
    )
    spread = torch.tensor([4.0, 3.0, 4.0, 0.6, 0.6, 0.6, 6.0, 3.0, 3.0])
    start = torch.tensor([-2.0, -1.5, 1.5, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0])
    return [Shape(kind, *row.tolist(), material=0) for row in start + spread * numbers]


def rays(count: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    origins = 0.3 * torch.randn(3, count, generator=generator)
    directions = torch.cat([torch.randn(2, count, generator=generator), torch.ones(1, count)])
    return origins, directions


def rotation(shape: Shape) -> Tensor:
    """Roll, then pitch, then yaw, written out with matrices of its own."""

    def about(axis: int, angle: float) -> Tensor:
        matrix = torch.eye(3, dtype=torch.double)
        a, b = [i for i in range(3) if i != axis]
        sign = -1.0 if axis == 1 else 1.0
        matrix[a, a] = matrix[b, b] = math.cos(angle)
        matrix[a, b], matrix[b, a] = -sign * math.sin(angle), sign * math.sin(angle)
        return matrix

    return about(1, shape.yaw) @ about(0, shape.pitch) @ about(2, shape.roll)


def inside(shape: Shape, points: Tensor) -> Tensor:
    """How far inside its unit shape points `[3, n]` lie; positive inside."""
    centre = torch.tensor([shape.x, -shape.up, shape.z], dtype=torch.double)
    half = torch.tensor([shape.half_x, shape.half_up, shape.half_z], dtype=torch.double)
    local = rotation(shape).T @ (points - centre[:, None]) / half[:, None]
    if shape.kind == BOX:
        return 1 - local.abs().amax(dim=0)
    if shape.kind == BALL:
        return 1 - local.norm(dim=0)
    return torch.minimum(1 - local[[0, 2]].norm(dim=0), 1 - local[1].abs())


def marched(scene: list[Shape], origin: Tensor, direction: Tensor) -> float:
    """First distance at which a ray is inside any shape, by small steps and bisection."""
    steps = torch.linspace(1e-3, 12, 12_000, dtype=torch.double)
    best = math.inf
    for shape in scene:
        within = inside(shape, origin[:, None] + steps * direction[:, None]) > 0
        if bool(within[0]) or not bool(within.any()):
            continue
        index = int(within.int().argmax())
        low, high = float(steps[index - 1]), float(steps[index])
        for _ in range(30):
            middle = (low + high) / 2
            hit = inside(shape, (origin + middle * direction)[:, None]) > 0
            low, high = (low, middle) if bool(hit) else (middle, high)
        best = min(best, high)
    return best


@pytest.mark.parametrize("kind", [BOX, BALL, TUBE])
def test_first_hits_are_those_of_small_steps(kind: int) -> None:
    scene = shapes(kind, 12)
    origins, directions = rays(12)
    distance, shape = nearest(make_geometry(scene), origins, directions, torch.full((12,), 12.0))
    for ray in range(12):
        expected = marched(scene, origins[:, ray].double(), directions[:, ray].double())
        if math.isinf(expected):
            assert shape[ray] == len(scene)
            assert distance[ray] == 12.0
        else:
            # Steps of a millimetre pass over what they only graze.
            assert distance[ray] == pytest.approx(expected, rel=1e-3)


def test_groups_hold_every_shape_and_bound_it() -> None:
    scene = shapes(BOX, 40) + shapes(BALL, 21) + shapes(TUBE, 30)
    geometry = make_geometry(scene)
    assert len(geometry.kind) == len(scene)
    assert sum(group.boxes for group in geometry.groups) == 40
    assert sum(group.balls for group in geometry.groups) == 21
    corner = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]).float()
    for index, group in enumerate(geometry.groups):
        assert group.boxes + group.balls + group.tubes <= GROUP_SHAPES
        to_world = torch.linalg.inv(geometry.to_local[group.shapes])
        centre = (to_world @ geometry.offset[group.shapes, :, None])[:, :, 0]
        corners = centre[:, None] + corner @ to_world.transpose(1, 2)
        reach = (corners - geometry.centre[index]).norm(dim=2)
        assert (reach <= geometry.radius[index] + 1e-4).all()


def enclosure(holes: Tensor, skirting: float = 0.1) -> Enclosure:
    return Enclosure(
        room=torch.tensor([[-2.0, -2.4, -2.0], [2.0, 0.0, 2.0]]),
        holes=holes,
        skirting=skirting,
        shell=torch.tensor([[-9.0, -9.0, -9.0], [9.0, 3.0, 9.0]]),
    )


def far_ball() -> Geometry:
    return make_geometry([Shape(BALL, 0, 0.5, -1.5, 0.1, 0.1, 0.1, 0, 0, 0, 0)])


def test_rays_end_at_the_walls_and_behind_holes_at_the_shell() -> None:
    window = torch.tensor([[[-0.5, -1.5, 1.9], [0.5, -0.5, 2.1]]])
    directions = torch.tensor([[0, 0, 1], [0, -0.9, 1], [0, 0.47, 1], [1, 0, 0.2], [0, 1, 0.1]]).T
    origins = torch.tensor([0.0, -1.0, 0.0])[:, None].expand(3, 5)
    hits = trace(far_ball(), enclosure(window), origins, directions.float())
    assert hits.shape.tolist() == [1 + SHELL, 1 + 2, 1 + SKIRTING, 1 + 1, 1 + 3]
    assert hits.distance.tolist() == pytest.approx([9.0, 1.4 / 0.9, 2.0, 2.0, 1.0], rel=1e-5)
    expected = torch.tensor([[0, 0, -1], [0, 1, 0], [0, 0, -1], [-1, 0, 0], [0, -1, 0]]).T
    torch.testing.assert_close(hits.normal, expected.float())
    through = leave_room(enclosure(window), origins, directions.float())[2]
    assert through.tolist() == [True, False, False, False, False]


def test_normals_point_to_the_viewer_and_fit_the_surface() -> None:
    scene = shapes(BOX, 10) + shapes(BALL, 10) + shapes(TUBE, 10)
    geometry = make_geometry(scene)
    origins, directions = rays()
    around = enclosure(torch.empty(0, 2, 3))
    around.room.copy_(torch.tensor([[-9.0, -9, -9], [9, 9, 9]]))
    hits = trace(geometry, around, origins, directions)
    torch.testing.assert_close(hits.normal.norm(dim=0), torch.ones(400))
    assert ((hits.normal * directions).sum(dim=0) < 1e-4).all()
    step = 1e-3 * hits.normal.double()
    for shape_ in scene:  # a step outwards leaves the shape, a step inwards enters it
        out, in_ = (inside(shape_, hits.points.double() + s * step) for s in (1, -1))
        on = (in_ > 1e-5) & (inside(shape_, hits.points.double()).abs() < 1e-4)
        assert (out[on] < 0).all()
