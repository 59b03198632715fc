"""The models and photographed surfaces of Debian's `sweethome3d-furniture`."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("BlendSwap-CC-0", "BlendSwap-CC-BY", "KatorLegaz", "Scopia")
TRANSPARENT = re.compile(r"^\s*(map_d\b|d\s+0|Tr\s+0?\.\d*[1-9]|illum\s+[4-9])", re.MULTILINE)
TEXTURE = re.compile(r"^\s*map_Kd\s+(?:-\w+ [\d. -]+)?(.+?)\s*$", re.MULTILINE)
SURFACE = re.compile(
    "wood|tile|brick|carpet|rug|marble|parquet|wall|fabric|stone|tela|madera|suelo", re.IGNORECASE
)
PICTURE = re.compile("frame|foto|photo|picture|cuadro|poster|map", re.IGNORECASE)
TEXTURED_SHARE = 0.75  # of the choices, where there are textured models


@dataclass(frozen=True)
class Model:
    """A model of furniture or of a small thing.

    Attributes:
        name: What it is.
        path: The OBJ file.
        size: Width, depth and height in metres.
        top: Height of the level on which things can stand, in metres.
        library: Name of its library.
        creator: Who made it.
        textured: Whether photographs cover it.
    """

    name: str
    path: Path
    size: tuple[float, float, float]
    top: float
    library: str
    creator: str
    textured: bool

    @property
    def broad(self) -> float:
        """The larger of width and depth."""
        return max(self.size[:2])


@dataclass(frozen=True)
class Catalogue:
    """Everything that rooms are furnished with."""

    models: tuple[Model, ...]
    surfaces: tuple[Path, ...]
    pictures: tuple[Path, ...]

    def pick(
        self, rng: random.Random, words: Sequence[str], broadest: float = 10.0
    ) -> Model | None:
        """Return a random model whose name matches one of some patterns, or None."""
        pattern = re.compile("|".join(words), re.IGNORECASE)
        found = [m for m in self.models if pattern.search(m.name) and m.broad <= broadest]
        textured = [m for m in found if m.textured]
        if textured and rng.random() < TEXTURED_SHARE:
            return rng.choice(textured)
        return rng.choice(found) if found else None

    def small(self, rng: random.Random) -> Model:
        """Return a random thing that fits on a table."""
        found = [m for m in self.models if max(m.size) < 0.45]
        textured = [m for m in found if m.textured]
        return rng.choice(textured if rng.random() < TEXTURED_SHARE else found)


def read_catalogue(library: Path) -> Catalogue:
    """Read the catalogue.

    Args:
        library: Folder that holds the unzipped libraries.

    Returns:
        All opaque models that stand as they are, and the photographed surfaces.

    Raises:
        FileNotFoundError: If a library is missing.
    """
    models = []
    for name in LIBRARIES:
        text = (library / name / "PluginFurnitureCatalog.properties").read_text("latin-1")
        entries: dict[int, dict[str, str]] = {}
        for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, re.MULTILINE):
            entries.setdefault(int(number), {})[key] = value.strip()
        for entry in entries.values():
            model = _model(library / name, name, entry)
            if model:
                models.append(model)
    photographs = sorted(path for name in LIBRARIES for path in (library / name).rglob("*.jpg"))
    return Catalogue(
        models=tuple(models),
        surfaces=tuple(p for p in photographs if SURFACE.search(str(p.relative_to(library)))),
        pictures=tuple(p for p in photographs if PICTURE.search(str(p.relative_to(library)))),
    )


def _model(root: Path, library: str, entry: dict[str, str]) -> Model | None:
    """Return an entry's model, or None if it is transparent, turned or incomplete."""
    path = root / entry["model"].lstrip("/")
    if path.suffix != ".obj" or not path.exists() or entry.get("modelRotation"):
        return None
    materials = "".join(p.read_text(errors="replace") for p in sorted(path.parent.glob("*.mtl")))
    textures = [name.replace("\\", "/") for name in TEXTURE.findall(materials)]
    missing = any(not (path.parent / name).exists() for name in textures)
    if TRANSPARENT.search(materials) or ".png" in materials or missing:
        return None
    width, depth, height = (float(entry[key]) / 100 for key in ("width", "depth", "height"))
    return Model(
        name=entry["name"],
        path=path,
        size=(width, depth, height),
        top=float(entry.get("dropOnTopElevation", 100 * height)) / 100,
        library=library,
        creator=entry.get("creator", "unknown"),
        textured=bool(textures),
    )
