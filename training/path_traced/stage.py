"""Meshes, materials and light in Blender, and the triangles for exact depth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import bpy
import numpy as np
import torch
from mathutils import Matrix, Vector
from mathutils.bvhtree import BVHTree

from ..scenes.noise import Noise
from ..scenes.textures import PAINTERS, SIZE
from .catalogue import Model

Corner = tuple[float, float, float]
SKIES = ("city", "courtyard", "forest", "sunrise")  # photographed; CC0, they come with bpy


@dataclass
class Imported:
    """A model's meshes and the corners of the box around them, in the file's units."""

    meshes: list[bpy.types.Object]
    low: np.ndarray
    high: np.ndarray


@dataclass
class Stage:
    """An empty Blender scene that is being filled; z is up, metres."""

    rng: random.Random
    noise: Noise
    vertices: list[Vector] = field(default_factory=list)
    faces: list[list[int]] = field(default_factory=list)
    things: list[int] = field(default_factory=list)  # which thing each face belongs to
    count: int = 0  # of things
    _imported: dict[Path, Imported] = field(default_factory=dict)

    def thing(self) -> None:
        """Count what follows as another thing."""
        self.count += 1

    def photograph(self, path: Path, rough: float) -> bpy.types.Material:
        """Return a material that shows an image file."""
        return _material(path.name, bpy.data.images.load(str(path), check_existing=True), rough)

    def painted(self, name: str, rough: float) -> bpy.types.Material:
        """Return a material that shows a synthesised tile of `scenes.textures`."""
        tile = PAINTERS[name](self.rng, self.noise).clamp(0.0, 1.0)
        pixels = torch.cat([tile.expand(3, SIZE, SIZE), torch.ones(1, SIZE, SIZE)])
        image = bpy.data.images.new(name, SIZE, SIZE)
        image.pixels.foreach_set(pixels.flip(1).permute(1, 2, 0).flatten().numpy())
        image.pack()
        return _material(name, image, rough)

    def plain(self, colour: Sequence[float], rough: float = 0.6) -> bpy.types.Material:
        """Return an evenly coloured material."""
        material = bpy.data.materials.new("plain")
        material.use_nodes = True
        shader = material.node_tree.nodes["Principled BSDF"]
        shader.inputs["Base Color"].default_value = (*colour, 1)
        shader.inputs["Roughness"].default_value = rough
        return material

    def quad(self, corners: Sequence[Corner], material: bpy.types.Material, tile: float) -> None:
        """Add a rectangle; the image repeats every `tile` metres, 0 fits it to the rectangle."""
        mesh = bpy.data.meshes.new("quad")
        mesh.from_pydata(corners, [], [(0, 1, 2, 3)])
        first = Vector(corners[0])
        width, height = (Vector(corners[1]) - first).length, (Vector(corners[3]) - first).length
        u, v = (width / tile, height / tile) if tile else (1.0, 1.0)
        layer = mesh.uv_layers.new()
        for loop, place in zip(layer.data, ((0, 0), (u, 0), (u, v), (0, v)), strict=True):
            loop.uv = place
        mesh.materials.append(material)
        bpy.context.scene.collection.objects.link(bpy.data.objects.new("quad", mesh))
        self._keep([Vector(corner) for corner in corners], [[0, 1, 2, 3]])

    def box(self, low: Corner, high: Corner, material: bpy.types.Material) -> None:
        """Add an upright box."""
        (x0, y0, z0), (x1, y1, z1) = low, high
        for corners in (
            ((x0, y0, z0), (x1, y0, z0), (x1, y0, z1), (x0, y0, z1)),
            ((x1, y1, z0), (x0, y1, z0), (x0, y1, z1), (x1, y1, z1)),
            ((x0, y1, z0), (x0, y0, z0), (x0, y0, z1), (x0, y1, z1)),
            ((x1, y0, z0), (x1, y1, z0), (x1, y1, z1), (x1, y0, z1)),
            ((x0, y0, z1), (x1, y0, z1), (x1, y1, z1), (x0, y1, z1)),
            ((x0, y1, z0), (x1, y1, z0), (x1, y0, z0), (x0, y0, z0)),
        ):
            self.quad(corners, material, 0.0)

    def place(self, model: Model, x: float, y: float, z: float, angle: float) -> None:
        """Add a model that stands at a point, turned about the vertical."""
        if model.path not in self._imported:
            self._imported[model.path] = _import(model.path)
        made = self._imported[model.path]
        extent = np.maximum(made.high - made.low, 1e-6)
        scale = [size / side for size, side in zip(model.size, extent.tolist(), strict=True)]
        middle = (made.low + made.high) / 2
        transform = (
            Matrix.Translation((x, y, z))
            @ Matrix.Rotation(angle, 4, "Z")
            @ Matrix.Diagonal((*scale, 1))
            @ Matrix.Translation((-middle[0], -middle[1], -made.low[2]))
        )
        self.thing()
        for mesh in made.meshes:
            copy = mesh.copy()
            copy.matrix_world = transform @ mesh.matrix_world
            bpy.context.scene.collection.objects.link(copy)
            points = [copy.matrix_world @ vertex.co for vertex in mesh.data.vertices]
            self._keep(points, [list(polygon.vertices) for polygon in mesh.data.polygons])

    def _keep(self, vertices: list[Vector], faces: list[list[int]]) -> None:
        first = len(self.vertices)
        self.vertices += vertices
        self.faces += [[index + first for index in face] for face in faces]
        self.things += [self.count] * len(faces)

    def tree(self) -> BVHTree:
        """Return the search tree of all faces, for rays."""
        return BVHTree.FromPolygons(self.vertices, self.faces)

    def sky(self, name: str, strength: float) -> None:
        """Surround the scene with a photographed sky."""
        world = bpy.data.worlds.new("sky")
        bpy.context.scene.world = world
        world.use_nodes = True
        nodes, links = world.node_tree.nodes, world.node_tree.links
        texture = nodes.new("ShaderNodeTexEnvironment")
        folder = Path(bpy.utils.system_resource("DATAFILES")) / "studiolights" / "world"
        texture.image = bpy.data.images.load(str(folder / f"{name}.exr"))
        links.new(texture.outputs[0], nodes["Background"].inputs[0])
        nodes["Background"].inputs[1].default_value = strength

    def lamp(self, place: Corner, watts: float, size: float, colour: Sequence[float]) -> None:
        """Add a level area lamp that shines down."""
        light = bpy.data.lights.new("lamp", "AREA")
        light.energy, light.size, light.color = watts, size, colour
        lamp = bpy.data.objects.new("lamp", light)
        lamp.location = place
        bpy.context.scene.collection.objects.link(lamp)

    def sun(self, towards: Corner, strength: float) -> None:
        """Add the sun.

        Args:
            towards: Direction from the scene to the sun, of any length.
            strength: Irradiance in watts per square metre.
        """
        light = bpy.data.lights.new("sun", "SUN")
        light.energy, light.angle, light.color = strength, 0.01, (1.0, 0.93, 0.82)
        sun = bpy.data.objects.new("sun", light)
        sun.rotation_euler = Vector(towards).to_track_quat("Z", "Y").to_euler()
        bpy.context.scene.collection.objects.link(sun)


def empty_stage(rng: random.Random, seed: int) -> Stage:
    """Return an empty stage; what Blender held before is gone."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    return Stage(rng, Noise(SIZE, torch.Generator().manual_seed(seed)))


def _import(path: Path) -> Imported:
    before = set(bpy.data.objects)
    bpy.ops.wm.obj_import(filepath=str(path), forward_axis="NEGATIVE_Z", up_axis="Y")
    meshes = [o for o in bpy.data.objects if o not in before and o.type == "MESH"]
    points = np.array([o.matrix_world @ v.co for o in meshes for v in o.data.vertices])
    for mesh in meshes:
        bpy.context.scene.collection.objects.unlink(mesh)
    return Imported(meshes, points.min(axis=0), points.max(axis=0))


def _material(name: str, image: bpy.types.Image, rough: float) -> bpy.types.Material:
    material = bpy.data.materials.new(name)
    material.use_nodes = True
    tree = material.node_tree
    shader = tree.nodes["Principled BSDF"]
    texture = tree.nodes.new("ShaderNodeTexImage")
    texture.image = image
    tree.links.new(texture.outputs[0], shader.inputs["Base Color"])
    shader.inputs["Roughness"].default_value = rough
    return material
