import itertools
import random
from pathlib import Path

import pytest

from training.path_traced import seeds
from training.path_traced.catalogue import LIBRARIES, Catalogue, read_catalogue

OPAQUE = "newmtl wood\nKd 1 1 1\nmap_Kd oak_wood.jpg\n"
GLASS = "newmtl glass\nd 0.3\n"


def add(library: Path, number: int, name: str, mtl: str, extra: str = "") -> None:
    """Add a model to a library's catalogue."""
    folder = library / f"model{number}"
    folder.mkdir()
    (folder / "m.obj").write_text("v 0 0 0\n")
    (folder / "m.mtl").write_text(mtl)
    (folder / "oak_wood.jpg").write_bytes(b"")
    with (library / "PluginFurnitureCatalog.properties").open("a") as file:
        file.write(
            f"name#{number}={name}\nmodel#{number}=/model{number}/m.obj\nwidth#{number}=120\n"
            f"depth#{number}=60\nheight#{number}=75\ncreator#{number}=Someone\n{extra}"
        )


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    for name in LIBRARIES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "PluginFurnitureCatalog.properties").write_text("id=x\n")
    library = tmp_path / LIBRARIES[0]
    add(library, 1, "Oak table", OPAQUE, "dropOnTopElevation#1=70\n")
    add(library, 2, "Glass table", GLASS)
    add(library, 3, "Turned table", OPAQUE, "modelRotation#3=1 0 0 0 1 0 0 0 1\n")
    add(library, 4, "Plain table", "newmtl white\nKd 1 1 1\n")
    add(library, 5, "Lost table", OPAQUE.replace("oak_wood", "missing"))
    return read_catalogue(tmp_path)


def test_catalogue_holds_what_is_opaque_upright_and_complete(catalogue: Catalogue) -> None:
    assert [model.name for model in catalogue.models] == ["Oak table", "Plain table"]
    oak, plain = catalogue.models
    assert oak.size == (1.2, 0.6, 0.75)
    assert (oak.top, plain.top) == (0.7, 0.75)
    assert (oak.textured, plain.textured) == (True, False)
    assert {path.name for path in catalogue.surfaces} == {"oak_wood.jpg"}


def test_models_are_picked_by_name_and_size(catalogue: Catalogue) -> None:
    rng = random.Random(0)
    picked = [catalogue.pick(rng, ("oak", "plain")) for _ in range(200)]
    names = [model.name for model in picked if model]
    assert names.count("Oak table") > names.count("Plain table") > 0
    assert catalogue.pick(rng, ("sofa",)) is None
    assert catalogue.pick(rng, ("table",), broadest=1.0) is None


def test_a_missing_library_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_catalogue(tmp_path)


def test_no_room_is_for_two_purposes() -> None:
    ranges = (seeds.JUDGING, seeds.VALIDATION, seeds.TRAINING)
    for first, second in itertools.pairwise(ranges):
        assert first.stop <= second.start
