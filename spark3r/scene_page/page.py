"""One HTML file that shows a reconstruction, and needs neither a network nor a server.

It holds three.js (``three.README`` says which), the cloud, the cameras and pictures of the frames.
Its content security policy forbids every request. With a dense prediction it shows dense and
reduced side by side, drawn from the same side, and the distance between them in colour.
"""

from __future__ import annotations

import html
import json
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import Spark3rError, printable
from ..geometry import camera_centres
from ..io.point_cloud import Pixels, confident_pixels, pixel_colours
from ..metrics.alignment import umeyama
from ..metrics.points import scene_size
from ..prediction import Prediction
from .pictures import frame_pictures

__all__ = ["MAX_BYTES", "POINTS", "write_scene"]

POINTS = 200_000
"""Largest number of points in a page. One takes 20 bytes there, and 40 where dense is shown too."""

MAX_BYTES = 15_000_000
"""Largest size of a page."""

_PICTURE_BYTES = 5_500_000  # of all pictures, as base64
_FRUSTUM = 0.04  # depth of a frustum, of the size of the scene
_SHOWN = 0.95  # share of points whose distance is below the end of the colour scale
_LEVELS = np.array(  # as in page.html, from near to far; the near end shows on a dark background
    [[106, 70, 180], [59, 110, 190], [33, 160, 150], [120, 205, 80], [253, 231, 37]]
)


def write_scene(
    path: Path,
    images: Tensor,
    names: Sequence[str],
    prediction: Prediction,
    *,
    title: str,
    facts: Iterable[tuple[str, str]] = (),
    dense: Prediction | None = None,
    least_confident_percent: float = 0.0,
    mask: Tensor | None = None,
) -> None:
    """Write the page of a scene, at most `MAX_BYTES` with at most `POINTS` points.

    Args:
        path: The file.
        images: The clip ``[S, 3, H, W]`` in [0, 1].
        names: Name of each frame.
        prediction: The prediction to show.
        title: Title of the page.
        facts: What to say of the run, as pairs of a name and a text.
        dense: The dense prediction of the same clip, shown beside it; None shows one scene. The
            other is moved onto it by the best similarity transform.
        least_confident_percent: Share of pixels that the cloud leaves out, 0 to below 100, default
            0.
        mask: ``[S, H, W]`` bool, False where a pixel makes no point; None takes all.

    Raises:
        OSError: If the file cannot be written.
        Spark3rError: If the points of the two predictions cannot be aligned.
    """
    pixels = confident_pixels(prediction, POINTS, least_confident_percent, mask)
    try:
        scene = _scene(images, names, prediction, dense, pixels)
    except ValueError as error:
        raise Spark3rError(f"dense and reduced cannot be shown side by side: {error}") from error
    said = "".join(
        f"<div><dt>{_shown_text(name)}</dt><dd>{_shown_text(text)}</dd></div>"
        for name, text in facts
    )
    parts = {
        "title": _shown_text(title),
        "facts": said,
        "points": f"{len(pixels[0]):,}",
        "data": json.dumps(scene, allow_nan=False).replace("<", "\\u003c"),
        "three": _resource("three.min.js"),
        "script": _resource("page.js"),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _resource("page.html"))
    path.write_text(page, encoding="utf-8")


def _shown_text(text: str) -> str:
    """Return text as HTML. A file name may have bytes that are no text, and they are escaped."""
    return html.escape(printable(text))


def _resource(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _scene(
    images: Tensor,
    names: Sequence[str],
    prediction: Prediction,
    dense: Prediction | None,
    pixels: Pixels,
) -> Mapping[str, Any]:
    """Return what the script of the page reads."""
    points, shown = prediction.points[pixels].float(), (dense or prediction).points[pixels].float()
    size = _size(shown, camera_centres((dense or prediction).extrinsics))
    views = [_view("dense", shown, _frusta(dense or prediction, size))]
    difference = {}
    if dense is not None:
        onto_dense = umeyama(points, shown)
        moved = onto_dense.apply(points).float()
        cameras = onto_dense.apply(_frusta(prediction, size / float(onto_dense.scale)))
        views.append(_view("reduced", moved, cameras))
        distance = (moved - shown).norm(dim=1) / scene_size(shown)
        end = float(distance.quantile(_SHOWN)) or 1.0
        levels = _levels((distance / end).clamp(max=1))
        difference = {"difference": _packed(levels), "scale": f"{100 * end:.2g} %"}
    counts = torch.bincount(pixels[0], minlength=prediction.frames)
    return {
        "views": views,
        "colours": _packed(pixel_colours(images, pixels)),
        "ends": counts.cumsum(0).tolist(),
        "names": list(names),
        "size": size,
        "middle": shown.median(dim=0).values.tolist() if len(shown) else [0.0, 0.0, 0.0],
        "pictures": frame_pictures(images, prediction, dense, _PICTURE_BYTES),
        **difference,
    }


def _view(name: str, points: Tensor, cameras: Tensor) -> dict[str, str]:
    return {"name": name, "points": _packed(points), "cameras": _packed(cameras)}


def _size(points: Tensor, centres: Tensor) -> float:
    """Return the size of the scene, without the farthest points."""
    middle = centres.float().median(dim=0).values
    near = float((points - middle).norm(dim=1).median()) if len(points) else 0.0
    return 2 * max(near, float((centres - middle).norm(dim=1).max()), 1e-6)


def _frusta(prediction: Prediction, size: float) -> Tensor:
    """Return the centre and the four far corners of each camera, ``[S, 5, 3]``."""
    height, width = prediction.image_size
    corners = torch.tensor([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]])
    rays = corners.double() @ prediction.intrinsics.double().inverse().transpose(1, 2)
    rotation = prediction.extrinsics[:, :, :3].double()
    centres = camera_centres(prediction.extrinsics.double())[:, None]
    return torch.cat([centres, rays * _FRUSTUM * size @ rotation + centres], dim=1)


def _levels(values: Tensor) -> Tensor:
    """Return the colours ``[N, 3]`` uint8 of values ``[N]`` in [0, 1]."""
    steps = np.linspace(0, 1, len(_LEVELS))
    channels = [np.interp(values.numpy(), steps, _LEVELS[:, channel]) for channel in range(3)]
    return torch.from_numpy(np.stack(channels, axis=1).round().astype(np.uint8))


def _packed(values: Tensor) -> str:
    """Return bytes, or other values as float32, as base64."""
    array = values.contiguous().numpy()
    array = array if array.dtype == np.uint8 else array.astype("<f4")
    return b64encode(array.tobytes()).decode("ascii")
