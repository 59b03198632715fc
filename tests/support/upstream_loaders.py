"""The models' own loaders of images, as far as they are installed.

They need torchvision for three small transforms only, and packages for things that loading does
not touch. Where those are missing, stand-ins of a few lines take their place, so that upstream's
code runs on; OpenCV is not replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import upstream_models  # noqa: F401  (puts SPARK3R_UPSTREAM on the path)
from torch import Tensor

Loader = Callable[[list[Path]], Tensor]

NEEDS = {
    "vggt": ("vggt",),
    "pi3": ("pi3", "huggingface_hub", "cv2"),
    "da3": ("depth_anything_3", "cv2", "tqdm"),
    "omega": ("vggt_omega",),
    "mapanything": ("mapanything", "uniception", "hydra", "einops", "cv2"),
    "panovggt": ("panovggt", "omegaconf", "cv2"),
}
"""Packages without which a family's loader cannot run."""


def missing(family: str) -> list[str]:
    return [package for package in NEEDS[family] if find_spec(package) is None]


def load(family: str, files: list[Path]) -> Tensor:
    """Return images ``[S, 3, H, W]`` of a folder's files, made by a family's own loader."""
    stand_in("torchvision.transforms", ToTensor=ToTensor, Normalize=Normalize, CenterCrop=Centre)
    stand_in("plyfile", PlyData=None, PlyElement=None)
    stand_in("imageio")
    with contextlib.redirect_stdout(io.StringIO()):
        return _LOADERS[family](files)


def _vggt(files: list[Path]) -> Tensor:
    from vggt.utils.load_fn import load_and_preprocess_images

    return load_and_preprocess_images([str(file) for file in files])


def _pi3(files: list[Path]) -> Tensor:
    from pi3.utils.basic import load_images_as_tensor

    return load_images_as_tensor(str(files[0].parent), verbose=False)


def _da3(files: list[Path]) -> Tensor:
    from depth_anything_3.utils.io.input_processor import InputProcessor

    return InputProcessor()([str(file) for file in files], num_workers=1)[0]


def _omega(files: list[Path]) -> Tensor:
    from vggt_omega.utils.load_fn import load_and_preprocess_images

    return load_and_preprocess_images([str(file) for file in files])


def _mapanything(files: list[Path]) -> Tensor:
    from mapanything.utils.image import load_images

    return torch.cat([view["img"] for view in load_images([str(file) for file in files])])


def _panovggt(files: list[Path]) -> Tensor:
    code = Path(find_spec("panovggt").submodule_search_locations[0]).parent / "inference.py"
    source = code.read_text(encoding="utf-8")
    start = source.index("def load_images_fixed")
    content: dict[str, Any] = {"_INPUT_H": 518, "_INPUT_W": 1036, "np": np, "torch": torch}
    content |= {"cv2": importlib.import_module("cv2"), "List": list}
    exec(source[start : source.index("# ====", start)], content)
    return content["load_images_fixed"]([str(file) for file in files])


_LOADERS: dict[str, Loader] = {
    "vggt": _vggt,
    "pi3": _pi3,
    "da3": _da3,
    "omega": _omega,
    "mapanything": _mapanything,
    "panovggt": _panovggt,
}


def stand_in(name: str, **attributes: object) -> None:
    """Put a module in place of one that cannot be imported."""
    try:
        __import__(name)
    except (ImportError, RuntimeError):  # torchvision beside another build of torch raises both
        for part in (name.partition(".")[0], name):
            sys.modules[part] = types.ModuleType(part)
        for attribute, value in attributes.items():
            setattr(sys.modules[name], attribute, value)
        if "." in name:
            setattr(sys.modules[name.partition(".")[0]], name.partition(".")[2], sys.modules[name])


class ToTensor:
    def __call__(self, image: object) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Normalize:
    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class Centre:
    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        height, width = self.size
        top, left = round((image.shape[1] - height) / 2), round((image.shape[2] - width) / 2)
        return image[:, top : top + height, left : left + width]
