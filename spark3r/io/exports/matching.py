"""Real matches between frames: SIFT features of pycolmap, compared where frames overlap."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...errors import Spark3rError
from .tracks import Cameras, Features, Ints, Matches, concatenated

__all__ = ["INSTALL", "load_pycolmap", "match_frames"]

INSTALL = "pip install 'spark3r[colmap]'"

_LARGEST_SIDE = 1600  # larger images are scaled down for the search of features
_FEATURES = 4096  # in each image
_SEED = 0


def load_pycolmap() -> ModuleType:
    """Return pycolmap, told to log errors alone.

    Raises:
        Spark3rError: If it is missing.
    """
    # pycolmap reads this when it is imported, and otherwise logs every step.
    os.environ.setdefault("GLOG_minloglevel", "2")
    try:
        return import_module("pycolmap")
    except ImportError as error:
        raise Spark3rError(
            f"matches are made with pycolmap, which is missing: {INSTALL}"
        ) from error


def match_frames(
    folder: Path, names: Sequence[str], cameras: Cameras, pairs: Sequence[tuple[int, int]]
) -> Matches:
    """Return features of image files, and those matches that fit a motion of the camera.

    Args:
        folder: Folder of the images.
        names: Their names.
        cameras: Their cameras, which two-view geometry begins from.
        pairs: Pairs of frames to compare.

    Raises:
        Spark3rError: If pycolmap is missing or fails.
    """
    pycolmap = load_pycolmap()
    pycolmap.set_random_seed(_SEED)
    with tempfile.TemporaryDirectory() as scratch:
        database, listed = Path(scratch) / "database.db", Path(scratch) / "pairs.txt"
        lines = [f"{names[first]} {names[second]}" for first, second in pairs]
        listed.write_text("\n".join(lines) + "\n", encoding="utf-8")
        try:
            _extract(pycolmap, database, folder, names)
            with pycolmap.Database.open(database) as store:
                ids = _set_cameras(pycolmap, store, names, cameras)
            _compare(pycolmap, database, listed)
            with pycolmap.Database.open(database) as store:
                return _read(pycolmap, store, ids, folder, names, len(pairs))
        except (RuntimeError, ValueError) as error:
            raise Spark3rError(f"pycolmap cannot match the frames: {error}") from error


def _extract(pycolmap: ModuleType, database: Path, folder: Path, names: Sequence[str]) -> None:
    options = pycolmap.FeatureExtractionOptions()
    options.max_image_size = _LARGEST_SIDE
    options.sift.max_num_features = _FEATURES
    reader = pycolmap.ImageReaderOptions()
    reader.camera_model = "PINHOLE"
    pycolmap.extract_features(
        database,
        folder,
        image_names=list(names),
        camera_mode=pycolmap.CameraMode.PER_IMAGE,
        reader_options=reader,
        extraction_options=options,
        device=pycolmap.Device.cpu,
    )


def _set_cameras(
    pycolmap: ModuleType, store: Any, names: Sequence[str], cameras: Cameras
) -> dict[int, int]:
    """Store the cameras in the database; return the number of the frame of each image."""
    frames = {}
    number_of = {name: number for number, name in enumerate(names)}
    for image in store.read_all_images():
        number = frames[image.image_id] = number_of[image.name]
        camera = store.read_camera(image.camera_id)
        matrix = cameras.intrinsics[number]
        camera.params = [matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2]]
        camera.has_prior_focal_length = True
        store.update_camera(camera)
    return frames


def _compare(pycolmap: ModuleType, database: Path, listed: Path) -> None:
    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.random_seed = _SEED
    pairing = pycolmap.ImportedPairingOptions()
    pairing.match_list_path = listed
    pycolmap.match_image_pairs(
        database,
        pairing_options=pairing,
        verification_options=verification,
        device=pycolmap.Device.cpu,
    )


def _read(
    pycolmap: ModuleType,
    store: Any,
    frames: dict[int, int],
    folder: Path,
    names: Sequence[str],
    compared: int,
) -> Matches:
    from PIL import Image

    image_of = {number: image for image, number in frames.items()}
    parts, first = [], [0]
    for number, name in enumerate(names):
        found = np.asarray(store.read_keypoints(image_of[number]), float)
        place = found[:, :2] if found.size else np.zeros((0, 2))
        with Image.open(folder / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        x, y = np.minimum(place.astype(int), np.array(pixels.shape[1::-1]) - 1).T
        parts.append(Features(np.full(len(place), number), place, pixels[y, x]))
        first.append(first[-1] + len(place))
    pairs: list[Ints] = [np.zeros((0, 2), np.int64)]
    for pair, geometry in zip(*store.read_two_view_geometries(), strict=True):
        one, two = (frames[image] for image in pycolmap.pair_id_to_image_pair(pair))
        offset = np.array([first[one], first[two]])
        pairs.append(np.asarray(geometry.inlier_matches, np.int64) + offset)
    return Matches(concatenated(parts), np.concatenate(pairs), compared)
